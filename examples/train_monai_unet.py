"""Trains a MONAI U-Net on real lesions with synthetic ones beside them, drawn by busigen while the training runs.

    pip install 'busigen[train,eval]'
    busigen prepare path/to/Dataset_BUSI_with_GT --out prepared
    python examples/train_monai_unet.py prepared --steps 2000

Half of each batch is real and half synthetic, and in either half benign lesions are as frequent as malignant ones.
The same command goes on where it was stopped. In the end it tells the mean Dice on the real test images.
"""

import argparse
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from busigen.data.prepared import Prepared
from busigen.torch import PairLoader, PairStream


class RealLesions(Dataset):
    """The images of one split with a lesion, as dictionaries like those of busigen.torch."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        self.prepared = prepared
        table = prepared.table.filter((prepared.table["split"] == split) & (prepared.table["class"] != "normal"))
        self.rows, self.labels = table["row"].to_list(), (table["class"] == "malignant").cast(int).to_list()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        row = self.rows[position]
        image = torch.from_numpy(self.prepared.clean[row].copy())[None].float() / 255
        mask = torch.from_numpy(self.prepared.masks[row] > 0)[None].float()
        return {"image": image, "mask": mask, "label": self.labels[position]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--out", type=Path, default=Path("unet.pt"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = options.batch_size // 2

    network = UNet(2, 1, 1, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    drawn = PairStream.drawn(classes="benign=1,malignant=1", batch_size=half)
    synthetic = PairLoader(drawn, half, num_workers=1)
    done = 0
    if options.out.exists():
        state = torch.load(options.out, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        synthetic.load_state_dict(state["synthetic"])
        done = state["done"]

    train = RealLesions(Prepared.open(options.prepared), "train")
    frequency = torch.bincount(torch.tensor(train.labels))
    weights = [1 / float(frequency[label]) for label in train.labels]
    real = DataLoader(train, half, sampler=WeightedRandomSampler(weights, half * options.steps))
    loss_of = DiceCELoss(sigmoid=True)
    for step, ours, theirs in zip(range(done + 1, options.steps + 1), real, synthetic, strict=False):
        image, mask = (torch.cat([ours[name], theirs[name]]).to(device) for name in ("image", "mask"))
        loss = loss_of(network(image), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
            states = {"network": network, "optimizer": optimizer, "synthetic": synthetic}
            torch.save({"done": step, **{name: one.state_dict() for name, one in states.items()}}, options.out)

    dice = DiceMetric()
    network.eval()
    with torch.no_grad():
        for batch in DataLoader(RealLesions(train.prepared, "test"), options.batch_size):
            dice((network(batch["image"].to(device)) > 0).float(), batch["mask"].to(device))
    print(f"Dice on {len(dice)} test images: {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
