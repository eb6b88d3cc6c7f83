"""Run a quantized model of which only a part may lie on the device, the rest on disk: offload.py MODEL --memory 1MiB"""

import argparse
import tempfile

import torch
from accelerate import dispatch_model, infer_auto_device_map
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--memory", default="1MiB", help="how much of the device the weights may take")
    arguments = parser.parse_args()

    device = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        dtype=torch.bfloat16,
        device_map={"": device},
    )
    prompt = torch.arange(10, 26, device=model.device).reshape(1, -1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(prompt).logits
        places = infer_auto_device_map(
            model, {device: arguments.memory}, no_split_module_classes=model._no_split_modules
        )
        if set(places.values()) == {"disk"}:
            parser.error(f"--memory {arguments.memory} has no room for any module of the model")
        model = dispatch_model(model, places, main_device=device, offload_dir=folder, force_hooks=True)
        after = model(prompt).logits
        away = sum(place == "disk" for place in places.values())
        print(f"{away} of {len(places)} modules on disk; the same logits: {torch.equal(before, after)}")


if __name__ == "__main__":
    main()
