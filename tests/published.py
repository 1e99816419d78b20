"""Train with karpathy/nanochat's own gpt.py and optim.py, which must come first on the path: `python published.py FOLDER` reads FOLDER/start.pt and writes FOLDER/losses.pt."""
import sys
from pathlib import Path

import torch
from nanochat.model.gpt import GPT, GPTConfig


def main(folder: Path):
    start = torch.load(folder/"start.pt")
    model = GPT(GPTConfig(**start["shape"]))
    model.init_weights() # makes the rotations
    model.load_state_dict(start["weights"])
    optimizer, losses = model.setup_optimizer(**start["rates"]), []
    for (x, y), how in zip(start["batches"], start["schedule"]):
        loss = model(x, y)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * how["lr_mult"]
            if group["kind"] == "muon":
                group["momentum"] = how["momentum"]
                group["weight_decay"] = start["rates"]["weight_decay"] * how["wd_mult"]
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    torch.save(losses, folder/"losses.pt")


if __name__ == "__main__": main(Path(sys.argv[1]))
