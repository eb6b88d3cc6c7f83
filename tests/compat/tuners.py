"""Other tuners of peft than LoRA, on a quantized tiny Llama; run by test_tuners.py and never imported.

    python tuners.py FOLDER OUT JOB [JOB ...]        one line of JSON in OUT/answers.jsonl for each tuner/kind

It is the same script on the real bitsandbytes and on the drop-in.  FOLDER has the float model of `qlora.py base`.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import bitsandbytes
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PveraConfig,
    RandLoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils import loftq_utils
from qlora import PROJECTIONS, load, logits, progressions, relative
from transformers import LlamaForCausalLM, set_seed

STEPS = 8
OTHERS = {"randlora": RandLoraConfig, "pvera": PveraConfig}  # on square layers: peft merges randlora into no others


def adapted(folder, out, tuner, kind):
    """The quantized model with its adapter."""
    options = {"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}
    set_seed(1)
    if tuner == "loftq":  # adapters that make up for what quantizing takes; the model without is saved beside them
        bits = {"loftq_bits": 8 if kind == "int8" else 4, "loftq_iter": 2}
        config = LoraConfig(r=8, init_lora_weights="loftq", loftq_config=bits, **options)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), config)
        model.peft_config["default"].init_lora_weights = True  # as peft's example does before it saves them
        model.save_pretrained(out / "loftq")
        model.unload().save_pretrained(out / "base")
        base = prepare_model_for_kbit_training(load(out, kind, False), use_gradient_checkpointing=False)
        return PeftModel.from_pretrained(base, out / "loftq", is_trainable=True)
    model = prepare_model_for_kbit_training(load(folder, kind, False), use_gradient_checkpointing=False)
    if tuner == "adalora":
        schedule = {"init_r": 12, "target_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": STEPS}
        return get_peft_model(model, AdaLoraConfig(**schedule, **options))
    if tuner in OTHERS:
        return get_peft_model(model, OTHERS[tuner](r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(model, LoraConfig(r=8, use_dora=tuner == "dora", **options))
    if tuner == "replaced":  # LoftQ's adapters for a model that is quantized already
        loftq_utils.replace_lora_weights_loftq(model, str(folder / "base/model.safetensors"))
    return model


def train(model, ids):
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=5e-3)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA moves ranks to where they matter
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(folder, out, tuner, kind):
    ids = progressions(8, (7,), 7)
    exact = logits(LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), ids)
    model = adapted(folder, out, tuner, kind).train()
    answer = {"error": relative(logits(model, ids), exact)}
    answer["quantization error"] = relative(logits(load(folder, kind, False), ids), exact)
    frozen = {name: param.detach().clone() for name, param in model.named_parameters() if not param.requires_grad}
    answer["loss"] = train(model, ids)
    now = dict(model.named_parameters())
    answer["base changed"] = [name for name, param in frozen.items() if not torch.equal(param, now[name].detach())]
    if tuner != "adalora":  # which peft does not merge into quantized weights
        tuned = logits(model, ids)
        answer["merge error"] = relative(logits(model.merge_and_unload(), ids), tuned)
    return answer


def on_the_cpu(function):
    """LoftQ's functions name the device that they compute on: cuda."""
    code = function.__wrapped__.__code__ if hasattr(function, "__wrapped__") else function.__code__
    moved = code.replace(co_consts=tuple("cpu" if one == "cuda" else one for one in code.co_consts))
    getattr(function, "__wrapped__", function).__code__ = moved


def main():
    torch.set_num_threads(1)
    folder, out = map(Path, sys.argv[1:3])
    served = hasattr(bitsandbytes, "__halfbyte_version__")
    if not served:  # its repacking on CPUs with AVX512-BF16 breaks merging after an evaluation
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    on_the_cpu(loftq_utils.loftq_init)
    on_the_cpu(loftq_utils._loftq_init_new)
    with open(out / "answers.jsonl", "w") as file:
        for job in sys.argv[3:]:
            answer = {**run(folder, out, *job.split("/")), "job": job, "served": served}
            print(json.dumps(answer), file=file, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
