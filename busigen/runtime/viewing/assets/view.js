// The page of `busigen view`. What the dataset says becomes text and nothing else: no HTML is ever made of it.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const PER_PAGE = [30, 60, 120, 240];
  const SIGNS = {
    "=": "=", "!=": "≠", "<": "<", "<=": "≤", ">": ">", ">=": "≥", "=none": "empty", "!=none": "filled",
  };
  const TOLD = ["class", "lesions", "asked_birads", "grid_level"]; // Columns that tiles show
  const CONDITION = /^\s*(\w+)\s*(==|!=|<=|>=|=|<|>)\s*("[^"]*"|'[^']*'|[^\s"'<>=!]+)\s*$/;

  /** A new element with a class and text, and others in it. */
  function made(tag, name = "", text = "", ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text) element.textContent = text;
    element.append(...children);
    return element;
  }

  const number = (value) => value.toLocaleString("en");
  const counted = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
  const shown = (value) => value === null || value === undefined ? "–" : String(value);
  const short = (value) => typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : shown(value);

  // ---- Where pairs come from: the server, or this very file.

  function served() {
    async function fetched(path, state) {
      const query = new URLSearchParams(state?.where.map((text) => ["where", text]));
      if (state?.sort) query.set("sort", state.sort);
      if (state?.down) query.set("down", "1");
      if (state?.first !== undefined) { query.set("first", state.first); query.set("count", state.per); }
      const answer = await fetch(`${path}?${query}`).catch(() => {
        throw new Error("busigen view does not answer any more. Start it again, and open the address that it prints.");
      });
      if (!answer.ok) throw new Error(await answer.text());
      return answer.json();
    }
    const files = { image: "image.png", mask: "mask.png", outline: "outline.svg", healthy: "healthy.png" };
    return {
      about: () => fetched("about.json"),
      list: (state) => fetched("pairs.json", { ...state, first: (state.page - 1) * state.per }),
      pair: (state) => fetched(`pair/${state.pair}/pair.json`, state),
      picture: (name, kind) => `pair/${name}/${files[kind]}`,
    };
  }

  function embedded(element) {
    const { about, pairs } = JSON.parse(element.textContent);
    const columns = new Map(about.columns.map((column, number) => [column.name, { ...column, number }]));
    const numbers = new Map(pairs.map((pair, number) => [pair.name, number]));

    /** What `convert --where` understands, of one comparison; a pair without a value fulfils =none alone. */
    function condition(text) {
      const found = CONDITION.exec(text);
      const column = found && columns.get(found[1]);
      if (!column) throw new Error(found ? `There is no column ${found[1]}.` : `The filter ${text} is unclear.`);
      const sign = found[2] === "==" ? "=" : found[2];
      const equality = sign === "=" || sign === "!=";
      if (found[3] === "none" && equality) return (pair) => (pair.row[column.number] === null) === (sign === "=");
      const word = found[3].replace(/^(["'])(.*)\1$/s, "$2");
      const isNumber = column.type === "int" || column.type === "float";
      const truth = { true: true, false: false }[word.toLowerCase()];
      const value = isNumber ? Number(word) : column.type === "bool" ? truth : word.toLowerCase();
      if (value === undefined || Number.isNaN(value) || !(equality || isNumber)) {
        throw new Error(`The filter ${text} does not fit what ${column.name} holds.`);
      }
      const compare = {
        "=": (a) => a === value, "!=": (a) => a !== value, "<": (a) => a < value,
        "<=": (a) => a <= value, ">": (a) => a > value, ">=": (a) => a >= value,
      }[sign];
      const held = (pair) => (column.type === "str" ? pair.row[column.number].toLowerCase() : pair.row[column.number]);
      return (pair) => pair.row[column.number] !== null && compare(held(pair));
    }

    function ordered(state) {
      const tests = state.where.map(condition);
      const found = pairs.filter((pair) => tests.every((test) => test(pair)));
      if (!state.sort) return state.down ? found.reverse() : found;
      const column = columns.get(state.sort);
      if (!column) throw new Error(`There is no column ${state.sort} to sort by.`);
      const value = (pair) => pair.row[column.number];
      const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1);
      const full = found.filter((pair) => value(pair) !== null).sort((a, b) => order(value(a), value(b)));
      return [...full, ...found.filter((pair) => value(pair) === null)];
    }

    const block = (name) => JSON.parse($(name).textContent);
    const cell = (pair, name) => (columns.has(name) ? pair.row[columns.get(name).number] : null);
    return {
      about: async () => about,
      async list(state) {
        const found = ordered(state);
        const first = (state.page - 1) * state.per;
        const tile = (pair) => ({
          name: pair.name,
          ...Object.fromEntries(TOLD.map((name) => [name, cell(pair, name)])),
          value: cell(pair, state.sort),
        });
        return { total: found.length, pairs: found.slice(first, first + state.per).map(tile) };
      },
      async pair(state) {
        const pair = pairs[numbers.get(state.pair)];
        if (!pair) throw new Error("There is nothing here.");
        const found = ordered(state);
        const rank = found.indexOf(pair);
        return {
          ...pair,
          row: Object.fromEntries(about.columns.map((column, number) => [column.name, pair.row[number]])),
          total: found.length,
          rank: rank < 0 ? null : rank,
          before: (rank > 0 && found[rank - 1].name) || null,
          after: (rank >= 0 && found[rank + 1]?.name) || null,
        };
      },
      picture(name, kind) {
        const number = numbers.get(name);
        const beside = kind === "healthy";
        const content = beside ? block(`healthy-${pairs[number].healthy}`) : block(`pixels-${number}`)[kind];
        return `data:image/${kind === "outline" ? "svg+xml" : "png"};base64,${content}`;
      },
    };
  }

  const source = $("embedded") ? embedded($("embedded")) : served();

  // ---- What is shown is what the address says behind its #.

  const wholeNumber = (text, otherwise) => (/^[1-9][0-9]{0,8}$/.test(text) ? Number(text) : otherwise);

  function read() {
    const query = new URLSearchParams(location.hash.slice(1));
    const per = wholeNumber(query.get("per"), 60);
    return {
      where: query.getAll("where"),
      sort: query.get("sort") ?? "",
      down: query.get("down") === "1",
      per: PER_PAGE.includes(per) ? per : 60,
      page: wholeNumber(query.get("page"), 1),
      outlined: query.get("outlines") !== "0",
      pair: query.get("pair") ?? "",
    };
  }

  function written(state) {
    const query = new URLSearchParams(state.where.map((text) => ["where", text]));
    if (state.sort) query.set("sort", state.sort);
    if (state.down) query.set("down", "1");
    if (state.per !== 60) query.set("per", state.per);
    if (state.page !== 1) query.set("page", state.page);
    if (!state.outlined) query.set("outlines", "0");
    if (state.pair) query.set("pair", state.pair);
    return `#${query}`;
  }

  let state = read();
  let drawn = ""; // The list that the grid shows, as an address
  let about = { columns: [] };
  let pages = 1;
  let turn = 0; // Answers to what was asked before are dropped
  let focused = ""; // The pair whose tile gets the focus when it is there: a name, "first" or "last"

  /** Show something else: as a new entry of the browser's history, or in place of this one. */
  function go(changes, replace = false) {
    const before = written(state);
    state = { ...state, ...changes };
    const address = written(state);
    if (address === before) return;
    if (replace) location.replace(address);
    else location.hash = address;
  }

  // ---- The controls.

  function fillControls() {
    const option = (value, text) => new Option(text, value);
    const names = about.columns.map((column) => column.name);
    $("column").replaceChildren(...names.map((name) => option(name, name)));
    if (names.includes("class")) $("column").value = "class";
    $("sort").replaceChildren(option("", "the manifest's order"), ...names.map((name) => option(name, name)));
    $("per").replaceChildren(...PER_PAGE.map((number) => option(number, number)));
    offerValues();
  }

  /** What the chosen column can be compared with, and how. */
  function offerValues() {
    const column = about.columns.find((one) => one.name === $("column").value);
    if (!column) return;
    const numeric = column.type === "int" || column.type === "float";
    const signs = Object.keys(SIGNS).filter((sign) => numeric || !/^[<>]/.test(sign));
    const before = $("sign").value;
    $("sign").replaceChildren(...signs.map((sign) => new Option(SIGNS[sign], sign)));
    $("sign").value = signs.includes(before) && !(numeric && before === "=") ? before : numeric ? ">=" : "=";
    $("values").replaceChildren(...(column.values ?? []).map((value) => new Option(value, value)));
    const range = numeric && column.least !== null ? `${short(column.least)} to ${short(column.most)}` : "";
    $("value").placeholder = column.type === "bool" ? "true or false" : range;
    $("value").inputMode = numeric ? "decimal" : "text";
    $("value-label").hidden = $("sign").value.endsWith("none");
  }

  function showControls() {
    $("sort").value = state.sort;
    $("down").checked = state.down;
    $("per").value = state.per;
    for (const box of document.querySelectorAll(".outlines")) box.checked = state.outlined;
    document.body.classList.toggle("outlined", state.outlined);
    $("filters").replaceChildren(...state.where.map((text, place) => {
      const button = made("button", "", `${text} ×`);
      button.setAttribute("aria-label", `Remove the filter ${text}`);
      button.addEventListener("click", () => {
        go({ where: state.where.filter((_, other) => other !== place), page: 1 });
        $("column").focus();
      });
      return made("li", "", "", button);
    }));
  }

  // ---- The grid.

  const dot = (label) => made("span", ["benign", "malignant"].includes(label) ? `dot ${label}` : "dot");

  const labelled = (label) => made("b", "", "", dot(label), `\u00a0${label}`);

  /** The image with its outline above, both of one pair; a text where it cannot be read. */
  function picture(name, kind, text = "", lazy = false) {
    const frame = made("span", "picture");
    const waiting = made("span", "", "loading");
    if (!lazy) frame.append(waiting);
    for (const layer of kind === "mask" ? ["mask"] : [kind, "outline"]) {
      const image = made("img", layer === "outline" ? "outline" : "");
      if (lazy) image.loading = "lazy";
      image.alt = layer === "outline" ? "" : text;
      image.addEventListener("load", () => { if (layer === kind) waiting.remove(); });
      image.addEventListener("error", () => {
        image.remove();
        waiting.remove();
        if (layer === kind) frame.append(made("span", "", "cannot be read"));
      });
      image.src = source.picture(name, layer);
      frame.append(image);
    }
    return frame;
  }

  function tile(pair) {
    const caption = made("span", "caption", "", made("span", "key", pair.name), " ", labelled(pair.class));
    if (pair.lesions > 1) caption.append(made("span", "value", `${pair.lesions} lesions`));
    const level = String(pair.grid_level ?? "");
    const birads = pair.asked_birads && !level.includes("BI-RADS") ? `BI-RADS ${pair.asked_birads}` : "";
    for (const text of [level, birads]) if (text) caption.append(made("span", "value", text));
    if (state.sort && state.sort !== "class") {
      caption.append(made("span", "value", `${state.sort} ${short(pair.value)}`));
    }
    const link = made("a", "", "", picture(pair.name, "image", "", true), caption);
    link.dataset.name = pair.name;
    return made("li", "", "", link);
  }

  const links = () => [...$("grid").querySelectorAll("a")];

  const gridAddress = () => written({ ...state, pair: "", outlined: true });

  async function showGrid() {
    const wanted = gridAddress();
    if (wanted === drawn) return;
    const mine = ++turn;
    const found = await source.list(state);
    if (mine !== turn) return;
    pages = Math.max(1, Math.ceil(found.total / state.per));
    if (state.page > pages) return go({ page: pages }, true);
    drawn = wanted;
    $("grid").replaceChildren(...found.pairs.map(tile));
    const all = about.pairs === found.total ? "" : ` of ${number(about.pairs)}`;
    const first = (state.page - 1) * state.per;
    const range = `${number(first + 1)} to ${number(first + found.pairs.length)} shown`;
    $("status").textContent = found.total
      ? `${counted(found.total, "pair")}${all}, ${range}` : `No pair${all} is as the filters ask`;
    $("page").value = state.page;
    $("pages").textContent = `of ${number(pages)}`;
    $("first").disabled = $("back").disabled = state.page === 1;
    $("on").disabled = $("last").disabled = state.page === pages;
    if (!focused) scrollTo(0, 0);
  }

  /** Let each tile lead to its pair as all else is now. */
  function addressTiles() {
    for (const link of links()) link.href = written({ ...state, pair: link.dataset.name });
  }

  function focusTile() {
    const all = links();
    const found = { first: all[0], last: all.at(-1) }[focused] ?? all.find((one) => one.dataset.name === focused);
    focused = "";
    found?.focus();
  }

  $("grid").addEventListener("keydown", (event) => {
    const all = links();
    const place = all.indexOf(document.activeElement);
    if (event.ctrlKey || event.altKey || event.metaKey || place < 0) return;
    if (event.key.toLowerCase() === "o") return go({ outlined: !state.outlined }, true);
    const across = getComputedStyle($("grid")).gridTemplateColumns.split(" ").length;
    const ends = { Home: 0, End: all.length - 1 };
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
    if (step === undefined && !(event.key in ends)) return;
    event.preventDefault();
    const target = step === undefined ? ends[event.key] : place + step;
    if (all[target]) all[target].focus();
    else if (target < 0 && state.page > 1) { focused = "last"; go({ page: state.page - 1 }); }
    else if (target >= all.length && state.page < pages) { focused = "first"; go({ page: state.page + 1 }); }
  });

  // ---- One pair, large.

  let neighbours = { before: null, after: null };
  let steps = 0; // To pairs further on or back that were asked for and not yet shown, by keys that came faster
  let turning = false;

  function turnBy(step) {
    steps += step;
    if (!turning) takeStep();
  }

  function takeStep() {
    const name = steps < 0 ? neighbours.before : steps > 0 ? neighbours.after : null;
    steps -= Math.sign(steps);
    turning = name !== null;
    if (turning) go({ pair: name }, true);
    else steps = 0;
  }

  function refusals(list) {
    if (list === null) return [made("p", "", "Unknown: the shard's record is lost.")];
    if (!list.length) return [made("p", "", "Nothing: the first draw was accepted.")];
    return [made("ol", "", "", ...list.map((draw) => made("li", "", `${draw.class}: ${draw.reason}`)))];
  }

  /** What a row says of each lesion, where it says it of several. */
  function lesions(row) {
    const found = [];
    while (row.lesions > 1 && typeof row[`lesion_${found.length + 1}_pixels`] === "number") {
      const of = (name) => short(row[`lesion_${found.length + 1}_${name}`]);
      const box = `${of("box_left")} to ${of("box_right")} across, ${of("box_top")} to ${of("box_bottom")} down`;
      const shape = `area share ${of("area_share")}, height/width ${of("height_width")}`;
      found.push(made("li", "", `${of("pixels")} pixels, ${box}; ${shape}`));
    }
    return found;
  }

  async function showPair() {
    const dialog = $("pair");
    if (!state.pair) {
      if (dialog.open) dialog.close();
      neighbours = { before: null, after: null };
      return takeStep();
    }
    const wanted = state.pair;
    $("pair-name").textContent = wanted;
    if (!dialog.open) { dialog.showModal(); $("pair-body").focus(); }
    const problem = (text) => { $("pair-error").textContent = text; $("pair-error").hidden = !text; };
    let pair;
    try {
      pair = await source.pair(state);
    } catch (error) {
      for (const id of ["pictures", "lesions", "refused", "row"]) $(id).replaceChildren();
      $("several").hidden = true;
      $("pair-place").textContent = "";
      neighbours = { before: null, after: null };
      takeStep();
      return problem(error.message);
    }
    if (wanted !== state.pair) return;
    problem(pair.problems.join("\n"));
    const label = pair.row.class;
    const place = pair.rank === null
      ? "not among those that the filters ask for" : `${number(pair.rank + 1)} of ${number(pair.total)}`;
    $("pair-place").replaceChildren(dot(label), ` ${label}, ${place}`);
    const figure = (kind, text) =>
      made("figure", "", "", picture(wanted, kind, `${text} of pair ${wanted}`), made("figcaption", "", text));
    const mask = figure("mask", "Mask");
    if (pair.row.lesion_pixels === 0) { // A black square, which nothing else tells from a mistake
      mask.querySelector("img").addEventListener("load", () => mask.firstChild.append(made("span", "", "empty")));
    }
    $("pictures").replaceChildren(
      figure("image", "Image"), ...(pair.beside === null ? [] : [figure("healthy", pair.beside)]), mask,
    );
    $("lesions").replaceChildren(...lesions(pair.row));
    $("several").hidden = !$("lesions").childElementCount;
    $("refused").replaceChildren(...refusals(pair.refused));
    $("row").replaceChildren(...Object.entries(pair.row).map(([name, value]) => {
      const head = made("th", "", name);
      head.scope = "row";
      return made("tr", "", "", head, made("td", "", shown(value)));
    }));
    neighbours = pair;
    $("previous").disabled = pair.before === null;
    $("next").disabled = pair.after === null;
    // So that the grid behind is at this pair when it is closed.
    if (pair.rank !== null) go({ page: Math.floor(pair.rank / state.per) + 1 }, true);
    takeStep();
  }

  function closePair() {
    focused = state.pair;
    go({ pair: "" });
  }

  $("previous").addEventListener("click", () => turnBy(-1));
  $("next").addEventListener("click", () => turnBy(1));
  $("close").addEventListener("click", closePair);
  $("pair").addEventListener("cancel", (event) => { event.preventDefault(); closePair(); });
  $("pair").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turnBy(-1);
    else if (event.key === "ArrowRight") turnBy(1);
    else if (event.key.toLowerCase() === "o") go({ outlined: !state.outlined }, true);
    else return;
    event.preventDefault();
  });

  // ---- All of it.

  async function show() {
    state = read();
    const wanted = gridAddress();
    showControls();
    $("grid").ariaBusy = "true";
    try {
      $("error").hidden = true;
      $("turn").hidden = false;
      await showGrid();
      addressTiles();
    } catch (error) {
      if (wanted !== gridAddress()) return; // Something else was asked for meanwhile.
      drawn = "";
      $("grid").replaceChildren();
      $("status").textContent = "";
      $("turn").hidden = true;
      $("error").textContent = error.message;
      $("error").hidden = false;
    }
    $("grid").ariaBusy = "false";
    await showPair();
    // Below an open dialog nothing takes the focus: it waits for the turn that closes it.
    if (!$("pair").open && focused && drawn === gridAddress()) focusTile();
  }

  $("column").addEventListener("change", offerValues);
  $("sign").addEventListener("change", () => { $("value-label").hidden = $("sign").value.endsWith("none"); });
  $("filter").addEventListener("submit", (event) => {
    event.preventDefault();
    const [column, sign, value] = [$("column").value, $("sign").value, $("value").value.trim()];
    const kind = about.columns.find((one) => one.name === column)?.type;
    if (!sign.endsWith("none") && !value) return $("value").focus();
    const fits = kind === "bool" ? /^(true|false)$/i.test(value) : kind === "str" || Number.isFinite(Number(value));
    if (!sign.endsWith("none") && !fits) {
      $("error").textContent = `${value} is ${kind === "bool" ? "neither true nor false" : "no number"}, as ${column} holds.`;
      $("error").hidden = false;
      return $("value").select();
    }
    const quote = value.includes('"') ? "'" : '"';
    const word = kind === "str" && !/^[\w.-]+$/.test(value) || value === "none" ? `${quote}${value}${quote}` : value;
    const text = sign.endsWith("none") ? `${column}${sign}` : `${column}${sign}${word}`;
    $("value").value = "";
    if (!state.where.includes(text)) go({ where: [...state.where, text], page: 1 });
  });
  $("sort").addEventListener("change", () => go({ sort: $("sort").value, page: 1 }));
  $("down").addEventListener("change", () => go({ down: $("down").checked, page: 1 }));
  $("per").addEventListener("change", () => go({ per: Number($("per").value), page: 1 }));
  for (const box of document.querySelectorAll(".outlines")) {
    box.addEventListener("change", () => go({ outlined: box.checked }, true));
  }
  $("first").addEventListener("click", () => go({ page: 1 }));
  $("back").addEventListener("click", () => go({ page: state.page - 1 }));
  $("on").addEventListener("click", () => go({ page: state.page + 1 }));
  $("last").addEventListener("click", () => go({ page: pages }));
  $("page").addEventListener("change", () => {
    const page = Math.min(wholeNumber($("page").value, state.page), pages);
    $("page").value = page;
    go({ page });
  });
  $("skip").addEventListener("click", (event) => { event.preventDefault(); (links()[0] ?? $("grid")).focus(); });
  addEventListener("hashchange", show);

  $("controls").open = matchMedia("(min-width: 48rem)").matches;
  source.about().then((found) => {
    about = found;
    document.title = `${about.name} – busigen view`;
    $("name").textContent = about.name;
    const classes = Object.entries(about.classes).map(([name, count]) => `${number(count)} ${name}`);
    $("summary").textContent = `${counted(about.pairs, "pair")}: ${classes.join(", ")}`;
    fillControls();
    return show();
  }).catch((error) => {
    $("error").textContent = error.message;
    $("error").hidden = false;
  });
})();
