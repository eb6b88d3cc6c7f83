"""Merge adapters into the quantized model they were trained on, and save the result: merge.py MODEL ADAPTER MERGED"""

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("merged")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        device_map="auto",
    )
    adapted = PeftModel.from_pretrained(model, arguments.adapter).eval()
    prompt = torch.arange(10, 26, device=model.device).reshape(1, -1)
    with torch.no_grad():
        before = adapted(prompt).logits.float()
        merged = adapted.merge_and_unload()
        after = merged(prompt).logits.float()
    print(f"logits changed by {float((after - before).norm() / before.norm()):.3f}")  # they are quantized once more
    merged.save_pretrained(arguments.merged)


if __name__ == "__main__":
    main()
