"""One process of llama.py: what one library takes for one case; the last line that it prints is JSON.

    python llama_worker.py LIBRARY CASE SIZE DEVICE [--profile FILE]

Run in the folder of `model`.  torch is the model in bf16.  The other two run the same lines: for halfbyte the drop-in
answers to `bitsandbytes`.
"""

import gc
import inspect
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

LIBRARY, CASE, SIZE, DEVICE, *PROFILE = sys.argv[1:]
if LIBRARY == "halfbyte":
    import halfbyte.compat.bitsandbytes  # noqa: F401  before peft, which imports bitsandbytes
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch  # noqa: E402
from make_model import SIZES  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, StaticCache  # noqa: E402

BF16 = torch.bfloat16
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 2048  # tokens of a training step
CACHE, PROMPT = 512, 128  # tokens of a decode
ON_GPU = DEVICE == "cuda"
REPEATS = 10 if ON_GPU else 2


def build(kind):
    """A Llama of random weights: "bf16", or with the linears of its layers in "nf4", "nf4 nested" or "int8"."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[SIZE], pad_token_id=0), dtype=BF16)
    if kind != "bf16":
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.layers.set_submodule(name, quantized(layer, kind))
        model.is_loaded_in_8bit = kind == "int8"
        model.is_loaded_in_4bit = not model.is_loaded_in_8bit
    return model.requires_grad_(False)


def quantized(layer, kind):
    import bitsandbytes as bnb

    shape = (layer.in_features, layer.out_features)
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        # From the CPU, because bitsandbytes quantizes from nowhere else.
        made.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": "nf4", "compress_statistics": kind == "nf4 nested"}
        made = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=BF16, **options, device="meta")
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **options)
    return made.to(DEVICE)


def fine_tune(kind, prepared):
    """A step of LoRA, r=16 on all linears, over one sequence, without gradient checkpointing.

    prepared   as Trainer with bf16=True on a model that peft has prepared: norms, embedding and head in float32,
               adapters in float32, autocast.  Otherwise all of it is bf16.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = build(kind)
    if prepared and kind == "bf16":  # what peft does to a quantized model
        for name, param in model.named_parameters():
            if name.split(".")[-2] not in LAYERS:
                param.data = param.data.float()
    elif prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=prepared).train()
    adapters = [param for param in model.parameters() if param.requires_grad]
    if not prepared:  # peft leaves those of int8 layers in float32
        for param in adapters:
            param.data = param.data.to(BF16)
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)
    length = LENGTH if ON_GPU else 32
    ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, BF16, enabled=prepared):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(3):
        step()
    forget_peak()
    times = [timed(step) for _ in range(REPEATS)]
    profile(step)
    return {"ms": statistics.median(times), "peak GB": peak()}


@torch.no_grad()
def decode(kind, batch):
    """A token for each of the batch: static cache, compiled into one CUDA graph."""
    model = build(kind).eval()
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    prompt = torch.randint(model.config.vocab_size, (batch, PROMPT), device=DEVICE)
    token = model(input_ids=prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    position = torch.tensor([PROMPT], device=DEVICE)
    places = {"position_ids": position[None]}
    if "cache_position" in inspect.signature(model.forward).parameters:  # older versions of transformers ask for it
        places["cache_position"] = position
    mode = {"mode": "reduce-overhead"} if ON_GPU else {"backend": "aot_eager"}
    forward = torch.compile(model.forward, fullgraph=True, **mode)

    def run(steps):
        nonlocal token
        for _ in range(steps):
            token = forward(input_ids=token, past_key_values=cache, **places).logits[:, -1:].argmax(-1)
            position.add_(1)

    run(20 if ON_GPU else 2)
    steps = 100 if ON_GPU else 2
    forget_peak()
    times = [timed(lambda: run(steps)) / steps for _ in range(3)]
    profile(lambda: run(1))
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]  # where inductor made no CUDA graph after all
    return {"ms": statistics.median(times), "peak GB": peak(), "graphs skipped": skipped or None}


def load(kind):
    """From bf16 files, which the operating system has in memory; the better of two."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
    options = {} if kind == "bf16" else {"quantization_config": config}
    options |= {"dtype": BF16, "device_map": {"": 0 if ON_GPU else "cpu"}}
    made, times = [], []

    def start():
        made.append(AutoModelForCausalLM.from_pretrained("model", **options))

    for _ in range(2):
        forget_peak()
        times.append(timed(start) / 1e3)
        made.clear()
    profile(start)
    return {"s": min(times), "peak GB": peak()}


def timed(call):
    """Milliseconds."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - started) * 1e3


def profile(call):
    """What a call spends its time on, into the file asked for."""
    if not PROFILE:
        return
    with torch.profiler.profile() as profiler:
        call()
        wait()
    order = f"self_{DEVICE}_time_total"
    Path(PROFILE[1]).write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def forget_peak():
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak():
    return torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else None


def main():
    what, kind, detail = [*CASE.split(", "), ""][:3]
    kind = "bf16" if LIBRARY == "torch" else kind
    if LIBRARY != "torch":
        import bitsandbytes

        assert hasattr(bitsandbytes, "__halfbyte_version__") == (LIBRARY == "halfbyte"), bitsandbytes.__file__
    if what == "train":
        figures = fine_tune(kind, detail == "prepared")
    elif what == "decode":
        figures = decode(kind, int(detail.removeprefix("batch ")))
    else:
        figures = load(kind)
    print(json.dumps(figures))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
