"""QLoRA of a tiny Llama with unmodified transformers, peft, Trainer and TRL; run by test_qlora.py and never imported.

    python qlora.py base FOLDER                      train the float model that the others start from
    python qlora.py train FOLDER OUT JOB [JOB ...]   quantize and fine-tune it, once per job; one JSON line for each
    python qlora.py save FOLDER OUT KIND [KIND ...]  quantize it; a checkpoint for each kind/nested
    python qlora.py read OUT CHECKPOINT [...]        load checkpoints; into OUT their logits and weights as floats

It is the same script on the real bitsandbytes and on the drop-in.  A job is
kind/nested/checkpointing/optimizer/trainer, as in nf4/1/0/adamw_8bit/trainer.  The data are arithmetic progressions
modulo 509: the float model learns steps 3 and 5, and the adapter step 7.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

STEPS = 20
LENGTH = 32
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATES = {"lion_8bit": 2e-3}


def progressions(count, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(509, (count, 1), generator=generator)
    step = torch.tensor(steps)[torch.randint(len(steps), (count, 1), generator=generator)]
    return (start + step * torch.arange(LENGTH)) % 509 + 3


def make_base(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        ids = progressions(16, (3, 5), step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "base")
    if "tokenizers" in sys.modules:  # TRL asks for a tokenizer, though the rows hold numbers already
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(512)}, unk_token="<0>"))
        special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "base")


def load(folder, kind, nested):
    if kind == "int8":
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=quantized, dtype=torch.float32)


@torch.no_grad()
def logits(model, ids):
    training = model.training
    found = model.eval()(input_ids=ids).logits
    model.train(training)
    return found


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def train(model, rows, job, out):
    _, _, checkpointing, optimizer, trainer = job
    options = {
        "output_dir": str(out / "trainer"),
        "optim": optimizer,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": LEARNING_RATES.get(optimizer, 5e-3),
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "seed": 7,
        "bf16": False,
    }
    if trainer == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"input_ids": rows.tolist()})
        made = SFTTrainer(model, SFTConfig(max_length=LENGTH, packing=False, **options), train_dataset=data)
    else:
        data = [{"input_ids": row, "labels": row} for row in rows]
        made = Trainer(model, TrainingArguments(**options), train_dataset=data, data_collator=default_data_collator)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def run(folder, out, job):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    kind, nested, checkpointing, optimizer, _ = job
    rows = progressions(160, (7,), 7)
    seen = rows[:8]
    answer = {"job": job}

    exact = logits(LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), seen)
    model = load(folder, kind, nested)
    before = logits(model, seen)
    answer["quantization error"] = relative(before, exact)
    model.save_pretrained(out / "quantized")
    again = LlamaForCausalLM.from_pretrained(out / "quantized", dtype=torch.float32)
    answer["reload differs by"] = float((logits(again, seen) - before).abs().max())

    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    set_seed(1)
    rank = 32 if "8bit" in optimizer else 8  # 8-bit states begin at 4096 elements
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    answer["trainable"] = sorted({name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad})
    answer["loss"] = train(model, rows, job, out)
    now = dict(model.named_parameters())
    answer["base changed"] = [name for name, p in frozen.items() if not torch.equal(p, now[name].detach())]

    tuned = logits(model, seen).float()
    model.save_pretrained(out / "adapter")
    adapted = PeftModel.from_pretrained(load(folder, kind, nested), out / "adapter")
    answer["adapter reload error"] = relative(logits(adapted, seen).float(), tuned)
    merged = model.merge_and_unload()
    answer["merge error"] = relative(logits(merged, seen).float(), tuned)
    quantized = logits(merged, seen).float()
    answer["dequantize error"] = relative(logits(merged.dequantize(torch.float32), seen).float(), quantized)
    return answer


def read(out, checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    # float16 numbers, because bitsandbytes casts activations to it before it quantizes them
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).half().float()
    with torch.no_grad():
        found = {"layer": model.model.layers[0].mlp.down_proj(x)}
    found["logits"] = logits(model, progressions(8, (3, 5), 99))
    found.update((name, one) for name, one in model.dequantize(torch.float32).state_dict().items() if "proj" in name)
    torch.save(found, out / f"{checkpoint.name}.pt")


def main():
    torch.set_num_threads(1)
    command, folder, *rest = sys.argv[1:]
    folder = Path(folder)
    if command == "base":
        make_base(folder)
        return
    import bitsandbytes

    served = hasattr(bitsandbytes, "__halfbyte_version__")
    if not served:  # its repacking on CPUs with AVX512-BF16 breaks saving and merging after an evaluation
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    if command == "read":
        for one in rest:
            read(folder, Path(one))
        return
    out, *jobs = rest
    out = Path(out)
    if command == "save":
        for text in jobs:
            kind, nested = text.split("/")
            load(folder, kind, nested == "1").save_pretrained(out / f"{kind}-{nested}")
        return
    with open(out / "answers.jsonl", "w") as file:
        for text in jobs:
            kind, nested, checkpointing, optimizer, trainer = text.split("/")
            job = (kind, nested == "1", checkpointing == "1", optimizer, trainer)
            answer = {**run(folder, out, job), "job": text, "served": served}
            print(json.dumps(answer), file=file, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
