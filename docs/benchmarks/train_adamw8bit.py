"""Train a small transformer on this repository's own text twice, with AdamW8bit and AdamW32bit, and plot both losses.

    python docs/benchmarks/train_adamw8bit.py --output docs/pages/adamw8bit.svg

Both runs start from the same weights and see the same batches.  Prints the losses on held-out text.  The plot needs
matplotlib.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from halfbyte import optim

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, BATCH, WIDTH, LAYERS = 64, 16, 128, 2
NAMES = ("AdamW32bit", "AdamW8bit")


class Model(nn.Module):
    """Predicts the next byte: float logits (batch, length, 256) of int64 bytes (batch, length)."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.bytes(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def corpus():
    """All pages and all Python sources, one after the other, as bytes."""
    files = [*sorted((ROOT / "docs/pages").glob("*.md")), *sorted((ROOT / "core").rglob("*.py"))]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batches(text, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(CONTEXT + 1)].long()


def loss_of(model, batch):
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(name, steps, text):
    """The training loss of each step and the loss on held-out text."""
    torch.manual_seed(0)
    model = Model()
    optimizer = getattr(optim, name)(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    held_out = len(text) // 10
    losses = []
    for batch in batches(text[:-held_out], steps, 1):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss.item())
    with torch.no_grad():
        held = [loss_of(model, batch).item() for batch in batches(text[-held_out:], 60, 2)]
    return losses, sum(held) / len(held)


def plot(found, path):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "halfbyte", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for (name, (losses, held)), style in zip(found.items(), ("-", "--")):
        span = max(1, len(losses) // 75)  # steps that a point is the mean of
        means = torch.tensor(losses[: len(losses) // span * span]).view(-1, span).mean(1).tolist()
        steps = [span * (i + 1) for i in range(len(means))]
        axes.plot(steps, means, style, label=f"{name}, held out {held:.3f}", linewidth=1.4)
    axes.set(xlabel="step", ylabel="loss per byte, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", help="where to write the plot, as SVG")
    arguments = parser.parse_args(words)

    text, found = corpus(), {}
    for name in NAMES:
        started = time.perf_counter()
        found[name] = train(name, arguments.steps, text)
        print(f"{name}: held-out loss {found[name][1]:.4f} after {time.perf_counter() - started:.0f} s", flush=True)
    plain, quantized = (found[name][1] for name in NAMES)
    print(f"{sum(p.numel() for p in Model().parameters()):,} parameters, {len(text):,} bytes of text")
    print(f"AdamW8bit ends at {quantized / plain - 1:+.2%} of AdamW32bit")
    if arguments.output:
        plot(found, arguments.output)
    return found


if __name__ == "__main__":
    main()
