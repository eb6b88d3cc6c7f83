"""Save a quantized model, load it again, and compare: save_reload.py MODEL QUANTIZED --bits 4"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIGS = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("quantized")
    parser.add_argument("--bits", type=int, choices=CONFIGS, default=4)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=CONFIGS[arguments.bits], dtype=torch.bfloat16, device_map="auto"
    )
    prompt = torch.arange(10, 26, device=model.device).reshape(1, -1)
    with torch.no_grad():
        before = model(prompt).logits
        model.save_pretrained(arguments.quantized)
        again = AutoModelForCausalLM.from_pretrained(arguments.quantized, dtype=torch.bfloat16, device_map="auto")
        after = again(prompt).logits
    size = sum(file.stat().st_size for file in Path(arguments.quantized).glob("*.safetensors"))
    print(f"{size / 2**20:.1f} MiB; the same logits: {torch.equal(before, after)}")


if __name__ == "__main__":
    main()
