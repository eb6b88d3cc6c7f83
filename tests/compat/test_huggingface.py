"""Unmodified transformers and peft on the drop-in, with a tiny Llama on the CPU."""

import importlib.util

import pytest

for needed in ("transformers", "accelerate", "peft"):  # looked for, not imported: peft imports bitsandbytes at once
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

TINY = """
import warnings
warnings.filterwarnings("ignore", message="paging to the host")
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LlamaForCausalLM(config).save_pretrained("base")
ids = torch.arange(3, 35).reshape(2, 16)

def load(kind, **more):
    if kind == "int8":
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, **more,
        )
    return LlamaForCausalLM.from_pretrained("base", quantization_config=quantized, dtype=torch.float32)
"""


def test_load_generate_save_reload_dequantize(served):
    done = served(
        TINY
        + """
import bitsandbytes as bnb
import halfbyte
base = LlamaForCausalLM.from_pretrained("base")

def flow(kind):
    model = load(kind)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is (halfbyte.nn.Linear8bitLt if kind == "int8" else halfbyte.nn.Linear4bit)
    assert isinstance(layer, bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit)
    with torch.no_grad():
        exact, logits = base(ids).logits, model(ids).logits
        error = float((logits - exact).norm() / exact.norm())
        assert error < (0.03 if kind == "int8" else 0.3), error
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert generated.shape == (2, 20)
        model.save_pretrained("quantized")
        again = LlamaForCausalLM.from_pretrained("quantized", dtype=torch.float32)
        assert torch.equal(again(ids).logits, logits)
        plain = again.dequantize()
        found = plain(ids).logits
        assert float((found - logits).norm() / logits.norm()) < (0.02 if kind == "int8" else 1e-5)

for kind in ("nf4", "fp4", "int8"):
    flow(kind)
print("done")
"""
    )

    assert done.stdout.endswith("done\n")


def test_lora_trains_and_merges(served):
    done = served(
        TINY
        + """
import bitsandbytes as bnb
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

def tune(kind):
    model = load(kind)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0], losses
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    model.eval()
    with torch.no_grad():
        tuned = model(ids).logits
        merged = model.merge_and_unload()
        error = float((merged(ids).logits - tuned).norm() / tuned.norm())
    assert error < (0.05 if kind == "int8" else 0.35), error

for kind in ("nf4", "int8"):
    tune(kind)
print("done")
"""
    )

    assert done.stdout.endswith("done\n")


def test_trainer_takes_every_name(served):
    done = served(
        TINY
        + """
import bitsandbytes as bnb

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return {"input_ids": ids[i % 2], "labels": ids[i % 2]}

names = [
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit",
    "paged_lion_8bit", "paged_lion_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit",
    "paged_ademamix_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]
for name in names:
    model = LlamaForCausalLM.from_pretrained("base")
    arguments = TrainingArguments(
        "out", optim=name, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        optim_args="alpha=0.9" if name.startswith("rmsprop") else None,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert type(inner).__module__.startswith("bitsandbytes.optim."), type(inner)
    states = {p: s["state1"].dtype for p, s in inner.state.items()}
    assert states[model.model.embed_tokens.weight] == torch.float32
    wanted = torch.uint8 if "8bit" in name else torch.float32
    assert states[model.model.layers[0].mlp.up_proj.weight] == wanted, name
    bnb.optim.GlobalOptimManager.get_instance().initialize()
print("done")
"""
    )

    assert done.stdout.endswith("done\n")


def test_every_flow_opens_no_connection_and_starts_no_process(served):
    done = served(
        """
import sys
seen = []
watched = ("socket.", "urllib.", "ftplib.", "http.", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")
sys.addaudithook(lambda event, args: event.startswith(watched) and seen.append(event))
"""
        + TINY
        + """
import bitsandbytes as bnb
before = [event for event in seen if event != "socket.__new__"]  # torch and transformers at their import

for kind in ("nf4", "fp4", "int8"):
    model = load(kind)
    model(input_ids=ids, labels=ids).loss
    model.generate(ids, max_new_tokens=2, do_sample=False)
    x = torch.randn(3, 64, requires_grad=True)
    model.model.layers[0].mlp.up_proj(x).sum().backward()
    model.save_pretrained("quantized")
    LlamaForCausalLM.from_pretrained("quantized")
bnb.optim.AdamW8bit([torch.nn.Parameter(torch.randn(5000))]).step()
assert [event for event in seen if event != "socket.__new__"] == before, seen
print("done")
"""
    )

    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bnb_4bit_quant_type='af4'", "quant_type must be one of nf4, fp4; got 'af4'"),
        ("bnb_4bit_quant_storage=torch.int16", "storage must be one of uint8, "),
        ("bnb_4bit_compute_dtype=torch.int8", "compute_dtype must be float32, float16, bfloat16; got int8"),
    ],
)
def test_what_there_is_not_is_refused_before_any_weight_is_read(served, options, message):
    done = served(
        TINY
        + f"""
import traceback
quantized = BitsAndBytesConfig(load_in_4bit=True, {options})
try:
    LlamaForCausalLM.from_pretrained("base", quantization_config=quantized)
except ValueError as error:
    steps = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert "_process_model_before_weight_loading" in steps, steps
    print(error)
"""
    )

    assert done.stdout.splitlines()[-1].startswith(message)


CORRUPT = {
    "absmax is short": "entries[key + '.absmax'] = entries[key + '.absmax'][:-1].clone()",
    "absmax is of other blocks": "change(blocksize=128)",
    "absmax is missing": "del entries[key + '.absmax']",
    "codes are short": "entries[key] = entries[key][:-1].clone()",
    "shape is another": "change(shape=[64, 128])",
    "shape is huge": "change(shape=[2**40, 128])",
    "type is another": "change(quant_type='af4')",
    "dtype is no dtype": "change(dtype='save')",
    "state is no JSON": "entries[blob] = torch.zeros(9, dtype=torch.uint8)",
    "scales are short": "entries[scales] = entries[scales][:-1].clone()",
    "scales are float16": "entries[scales] = entries[scales].half()",
    "scales are missing": "del entries[scales]",
}


def test_corrupt_checkpoint_is_refused(served):
    done = served(
        TINY
        + f"""
import json, logging, shutil
from safetensors.torch import load_file, save_file
logging.disable(logging.CRITICAL)
load("nf4").save_pretrained("nf4")
load("int8").save_pretrained("int8")
key = "model.layers.0.mlp.up_proj.weight"
scales, blob = "model.layers.0.mlp.up_proj.SCB", key + ".quant_state.bitsandbytes__nf4"

def change(**values):
    state = {{**json.loads(bytes(entries[blob].tolist())), **values}}
    entries[blob] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

for name, spoil in {CORRUPT!r}.items():
    shutil.copytree("int8" if "scales" in spoil else "nf4", "spoilt", dirs_exist_ok=True)
    entries = load_file("spoilt/model.safetensors")
    exec(spoil)
    save_file(entries, "spoilt/model.safetensors", metadata={{"format": "pt"}})
    try:
        LlamaForCausalLM.from_pretrained("spoilt")
    except RuntimeError:
        continue
    print("loaded although", name)
print("done")
"""
    )

    assert done.stdout == "done\n"  # and no name of what was loaded all the same
