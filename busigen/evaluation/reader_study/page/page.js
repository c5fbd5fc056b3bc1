
"use strict";
(() => {
  const { study, schema, images } = JSON.parse(document.getElementById("study").textContent);
  const at = (id) => document.getElementById(id);
  const QUESTIONS = ["rating", "birads"];
  const home = `busigen-reader-study/${study}`;
  let reader = "";
  let place = 1;
  let answers = {};

  // What is kept may be another program's, or cut off: anything but an answer is left out.
  function kept(name) {
    let found = null;
    try {
      found = JSON.parse(localStorage.getItem(`${home}/${name}`));
    } catch {}
    const sound = {};
    for (let image = 1; image <= images.length; image++) {
      const one = found?.answers?.[image];
      for (const question of QUESTIONS) {
        if (option(question, one?.[question])) (sound[image] ??= {})[question] = one[question];
      }
    }
    return { answers: sound, place: images[found?.place - 1] === undefined ? 1 : found.place };
  }

  function keep() {
    try {
      localStorage.setItem(home, reader);
      localStorage.setItem(`${home}/${reader}`, JSON.stringify({ place, answers }));
    } catch {
      at("problem").textContent = "This browser keeps nothing for this page. Save your answers before you close it.";
      at("problem").hidden = false;
    }
  }

  function option(question, value) {
    return Number.isInteger(value) ? at(question).querySelector(`input[value="${value}"]`) : null;
  }

  const answered = (image) => QUESTIONS.every((question) => Number.isInteger(answers[image]?.[question]));
  const missing = () => images.findIndex((_, index) => !answered(index + 1)) + 1;
  const count = () => images.filter((_, index) => answered(index + 1)).length;

  function view(name) {
    for (const id of ["start", "reading", "done"]) at(id).hidden = id !== name;
  }

  function show(image) {
    place = image;
    keep();
    view("reading");
    at("picture").src = `data:image/png;base64,${images[image - 1]}`;
    at("picture").alt = `Ultrasound image ${image}`;
    at("place").textContent = `Image ${image} of ${images.length}`;
    at("back").disabled = image === 1;
    at("hint").textContent = "";
    refresh();
    focus(QUESTIONS[0]);
    scrollTo(0, 0);
  }

  function refresh() {
    for (const question of QUESTIONS) {
      for (const input of at(question).querySelectorAll("input")) {
        input.checked = Number(input.value) === answers[place]?.[question];
      }
    }
    at("progress").value = count();
    at("count").textContent = `${count()} answered`;
  }

  function focus(question) {
    (at(question).querySelector("input:checked") ?? at(question).querySelector("input")).focus({ preventScroll: true });
  }

  function answer(question, value) {
    (answers[place] ??= {})[question] = value;
    keep();
    refresh();
    at("hint").textContent = answered(place) ? "Enter goes on." : "";
  }

  function save() {
    const given = images.map((_, index) => ({ image: index + 1, rating: null, birads: null, ...answers[index + 1] }));
    const content = { schema, study, reader, answers: given.filter((one) => one.rating !== null || one.birads !== null) };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    link.download = `answers-${reader.replace(/[^\p{L}\p{N}]+/gu, "_")}-${study.slice(0, 8)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  function start() {
    view("start");
    try {
      at("reader").value = localStorage.getItem(home) ?? "";
    } catch {}
    tell();
    at("reader").focus();
  }

  // Whose answers are here already, so that nobody goes on with another's by mistake.
  function tell() {
    const name = at("reader").value.trim();
    const found = name && Object.keys(kept(name).answers).length;
    at("kept").textContent = found ? `Answers to ${found} of ${images.length} images are kept here under this name.` : "";
  }

  at("study-name").textContent = study;
  at("reader").addEventListener("input", tell);
  at("begin").addEventListener("submit", (event) => {
    event.preventDefault();
    reader = at("reader").value.trim();
    if (!reader) return;
    ({ answers, place } = kept(reader));
    if (count() === images.length) finish();
    else show(answered(place) ? missing() : place);
  });

  function finish() {
    keep();
    view("done");
    at("done").querySelector("h1").focus();
  }

  at("answer").addEventListener("change", (event) => answer(event.target.name, Number(event.target.value)));
  at("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    const open = QUESTIONS.find((question) => !Number.isInteger(answers[place]?.[question]));
    if (open) {
      at("hint").textContent = "Answer both questions first.";
      focus(open);
    } else if (place < images.length) show(place + 1);
    else if (missing()) show(missing());
    else finish();
  });
  const back = () => place > 1 && show(place - 1);
  at("back").addEventListener("click", back);
  at("again").addEventListener("click", () => show(1));
  for (const button of document.querySelectorAll(".save")) button.addEventListener("click", save);
  for (const button of document.querySelectorAll(".leave")) button.addEventListener("click", start);

  document.addEventListener("keydown", (event) => {
    if (at("reading").hidden || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === "Backspace") {
      event.preventDefault();
      back();
    } else if (/^[0-9]$/.test(event.key)) {
      const inside = QUESTIONS.find((question) => at(question).contains(document.activeElement));
      const question = inside ?? QUESTIONS.find((one) => !Number.isInteger(answers[place]?.[one])) ?? QUESTIONS[0];
      if (!option(question, Number(event.key))) return;
      event.preventDefault();
      answer(question, Number(event.key));
      focus(QUESTIONS[1]);
    }
  });

  // Another tab with the same reader has gone on: what it kept counts.
  addEventListener("storage", (event) => {
    if (reader && event.key === `${home}/${reader}` && event.newValue !== null) {
      answers = kept(reader).answers;
      refresh();
    }
  });

  start();
})();
