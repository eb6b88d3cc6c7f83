"""Load a model in 4 or 8 bits and generate from it: generate.py MODEL --bits 4"""

import argparse

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIGS = {
    4: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, choices=CONFIGS, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=CONFIGS[arguments.bits], dtype=torch.bfloat16, device_map="auto"
    )
    print(f"{model.get_memory_footprint() / 2**20:.1f} MiB")

    prompt = torch.arange(10, 26, device=model.device).reshape(1, -1)  # numbers, because random weights know no words
    made = model.generate(prompt, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False)
    print(*made[0, prompt.shape[1] :].tolist())


if __name__ == "__main__":
    main()
