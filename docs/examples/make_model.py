"""Write a Llama of random weights, so that the other examples need no download: make_model.py FOLDER [--size 8b]"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    # the shape of Llama 3.1 8B
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[arguments.size], bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype=torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.folder)
    print(f"{model.num_parameters():,} parameters in {arguments.folder}")


if __name__ == "__main__":
    main()
