"""Train all of a model, unquantized, with an optimizer whose states have 8 bits: train_8bit_optimizer.py MODEL"""

import argparse

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to(device).train()

    # Embeddings keep states of 32 bits: their gradients are rare and large.
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)

    ids = (torch.arange(8)[:, None] * 31 + 7 * torch.arange(32)) % 500 + 3
    ids, losses = ids.to(device), []
    for _ in range(arguments.steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    elements = sum(p.numel() for p in model.parameters())
    states = sum(
        one.numel() * one.element_size()
        for state in optimizer.state.values()
        for one in state.values()
        if torch.is_tensor(one)
    )
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {states / elements:.2f} bytes of states per parameter")


if __name__ == "__main__":
    main()
