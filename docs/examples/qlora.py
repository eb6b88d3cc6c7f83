"""Fine-tune adapters on a model in 4 bits, with gradient checkpointing and a paged optimizer: qlora.py MODEL ADAPTER"""

import argparse

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, default_data_collator

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(count: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Something to learn: each number is the one before, and 7."""
    starts = torch.randint(vocabulary - 3, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (starts + 7 * torch.arange(length)) % (vocabulary - 3) + 3
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=32)
    arguments = parser.parse_args()

    torch.manual_seed(0)  # adapters begin at random
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=arguments.adapter,
            optim="paged_adamw_8bit",
            learning_rate=5e-3,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows(160, arguments.length, model.config.vocab_size),
        data_collator=default_data_collator,
    )
    trainer.train()
    model.save_pretrained(arguments.adapter)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
