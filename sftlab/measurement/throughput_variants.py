"""Which trainings does benchmarks/throughput.py measure?

VARIANTS are this project beside trl and a published loop. FUSED_LORA are pairs with and without
fused LoRA, CAPTURED pairs with and without captured_step, PEERS are the fastest other trainers at
their best, and FAMILIES are other models than Llama. A packed row of a peer is full: 20 of 512
tokens hold about 32 rows of the data.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QVO = ["q_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


class Variant(NamedTuple):
    """A trainer under a launch config.

    `fields` are those of the recipe, of trl's SFTConfig, or of the loop. `longest` and `shortest`
    are the most and fewest tokens of a row, `gb` an upper bound of the memory that it reserves on a
    GPU. `needs` are modules without which it cannot run. `warm` and `steps` are the steps before
    the first turn and in a turn, None for the worker's own. `profiled` asks for one turn more.
    """

    kind: str
    launch: str
    fields: dict[str, Any]
    longest: int = 512
    shape: str = "llama3.2-1b"
    on_all_gpus: bool = False
    gb: int = 30
    shortest: int = 16
    needs: tuple[str, ...] = ()
    warm: int | None = None
    steps: int | None = None
    profiled: bool = False

    def missing(self) -> list[str]:
        """Returns the modules that it needs and that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


def sft(
    launch: str,
    rows: int = 32,
    longest: int = 512,
    gb: int = 20,
    on_all: bool = False,
    **fields: Any,
) -> Variant:
    """Returns a variant of recipes/sft.py, with `rows` rows a step for each process."""
    fields |= {"per_device_train_batch_size": rows, "max_length": longest}
    return Variant("sft", launch, fields, longest, on_all_gpus=on_all, gb=gb, profiled=True)


def trl(targets: list[str], rows: int, gb: int, flash: bool = True, **others: Any) -> Variant:
    """Returns trl at its best: packed rows, FlashAttention-2 and the Liger kernels.

    Without `flash` rows are padded, and transformers chooses the attention.
    """
    fields = {
        "packing": flash,
        "use_liger_kernel": True,
        **({"attn_implementation": "flash_attention_2"} if flash else {}),
        "per_device_train_batch_size": rows,
        "lora": {"target_modules": targets},
    }
    needs = (*(("flash_attn",) if flash else ()), "liger_kernel")
    return Variant("trl", "single", fields, gb=gb, needs=needs)._replace(**PACE | others)


def unsloth(
    targets: list[str], rows: int, gb: int, lora: dict[str, Any] | None = None, **others: Any
) -> Variant:
    """Returns Unsloth at its best: packed rows, FlashAttention-2, its checkpointing off.

    `lora` are more fields of the LoRA config. `load_in_4bit` and `max_length` of the model are
    taken from `others`.
    """
    fields = {
        "packing": True,
        "per_device_train_batch_size": rows,
        "lora": {"target_modules": targets, **(lora or {})},
        "load_in_4bit": others.pop("load_in_4bit", False),
        "max_length": others.get("longest", 512),
    }
    needs = ("unsloth", "flash_attn", *(("bitsandbytes",) if fields["load_in_4bit"] else ()))
    return Variant("unsloth", "single", fields, gb=gb, needs=needs)._replace(**PACE | others)


# what is compared with peers warms up for less long, and has shorter turns
PACE = {"warm": 10, "steps": 10}
SLOW = {"warm": 4, "steps": 4}
# steps in which nearly all sizes of a micro-batch come, each of which is captured
WARM_CAPTURED = 250


def paced(variant: Variant, **others: Any) -> Variant:
    """Returns a variant of recipes/sft.py with the pace of its peers."""
    return variant._replace(**{"profiled": False} | PACE | others)


LLAMA_7B = "llama2-7b"
QLORA_7B = {
    "load_in_4bit": True,
    "optim": "paged_adamw_32bit",
    "gradient_checkpointing": True,
    "max_length": 1024,
    "per_device_train_batch_size": 4,
    "lora": {"r": 32, "lora_alpha": 64, "target_modules": ALL},
}
VARIANTS = {
    "sft.py bf16": sft("single"),
    "sft.py fp8": sft("fp8", gb=14),
    "sft.py bf16, all linears": sft("single", gb=26, lora_target_modules=ALL),
    "sft.py fp8, all linears": sft("fp8", lora_target_modules=ALL),
    "published loop, fp16": Variant("loop", "single", {"autocast": "float16"}, gb=42),
    "trl bf16": Variant("trl", "single", {}),
    "sft.py bf16, 64 rows": sft("single", rows=64, gb=30),
    "sft.py fp8, 64 rows": sft("fp8", rows=64, gb=40),
    "sft.py bf16, all linears, 64 rows": sft("single", rows=64, gb=36, lora_target_modules=ALL),
    "sft.py fp8, all linears, 64 rows": sft("fp8", rows=64, gb=66, lora_target_modules=ALL),
    "sft.py fp8, all linears, 64 rows, LoRA not fused": sft(
        "fp8", rows=64, gb=66, lora_target_modules=ALL, fused_lora="false"
    ),
    "sft.py bf16, 20 rows": sft("single", rows=20, gb=16),
    "sft.py fp32, 20 rows": sft("fp32", rows=20, gb=30),
    "sft.py bf16, dropout 0.05": sft("single", lora_dropout=0.05),
    "sft.py bf16, deterministic": sft("single", deterministic="true"),
    "sft.py bf16, not compiled": sft("single", gb=30, compile_layers="false"),
    "sft.py bf16, loss not fused": sft("single", rows=20, gb=18, fused_loss="false"),
    "published loop, bf16": Variant("loop", "single", {"autocast": "bfloat16"}, gb=42),
    "sft.py bf16, not packed": sft("single", rows=20, gb=36, packing="false"),
    "sft.py bf16, rows to 1024": sft("single", rows=24, longest=1024),
    "sft.py bf16, rows to 4096": sft("single", rows=16, longest=4096),
    "sft.py fp8, rows to 4096": sft("fp8", rows=16, longest=4096, gb=14),
    "trl as it comes": Variant(
        "trl", "single", {"dtype": "float32", "gradient_checkpointing": True}, gb=16
    ),
    "published loop, fp32": Variant("loop", "single", {"autocast": None}, gb=50),
    "trl bf16, compiled": Variant("trl", "single", {"torch_compile": True}, gb=22),
    "trl bf16, packed, sdpa": Variant("trl", "single", {"packing": True}, gb=26),
    "trl bf16, packed, sdpa, Liger": Variant(
        "trl", "single", {"packing": True, "use_liger_kernel": True}, gb=24
    ),
    "sft.py QLoRA, 7B": sft(
        "single", rows=4, longest=1024, gb=24, recipe="llama2-7b/all_r32"
    )._replace(shape=LLAMA_7B),
    "trl QLoRA, 7B": Variant("trl", "single", QLORA_7B, 1024, LLAMA_7B, gb=40),
    "sft.py bf16, DDP, 20 rows": sft(
        "ddp", rows=20, gb=30, on_all=True, captured_step="true"
    )._replace(warm=WARM_CAPTURED),
    "sft.py bf16, FSDP2, 20 rows": sft("fsdp", rows=20, gb=18, on_all=True),
    "sft.py bf16, FSDP2, 20 rows, a layer a unit": sft(
        "fsdp", rows=20, gb=18, on_all=True, fsdp_layers_per_unit=1
    ),
    "sft.py bf16, DDP": sft("ddp", gb=24, on_all=True),
    "sft.py bf16, FSDP2": sft("fsdp", gb=24, on_all=True),
    "sft.py bf16, DDP, 64 rows": sft("ddp", rows=64, gb=64, on_all=True),
    "sft.py bf16, FSDP2, 64 rows": sft("fsdp", rows=64, gb=64, on_all=True),
    "sft.py fp8, DDP": sft("fp8", gb=20, on_all=True),
}
# pairs with and without fused_lora, for linears, rows a step and dropout
_FUSED_1B = {
    f"sft.py bf16, {linears}, {rows} rows, dropout {dropout}{', LoRA fused' * fused}": sft(
        "single", rows=rows, gb=gb, lora_dropout=dropout, lora_target_modules=targets,
        fused_lora="true" if fused else "false",
    )
    for linears, targets, sizes in (
        ("all linears", ALL, {64: 64, 20: 24}),
        ("q, v and o", QVO, {64: 46}),
    )
    for rows, gb in sizes.items()
    for dropout in (0, 0.05)
    for fused in (False, True)
}  # fmt: skip


def qlora(rows: int, gb: int, launch: str = "single") -> Variant:
    """Returns recipes/sft.py on the 7B shape in 4 bits, its activations kept."""
    one = sft(launch, rows, 1024, gb, recipe="llama2-7b/all_r32", gradient_checkpointing="false")
    return paced(one, shape=LLAMA_7B, needs=("bitsandbytes",))


def all_linears(rows: int, gb: int, fused: bool) -> Variant:
    """Returns recipes/sft.py with LoRA on all linears of the 1B shape, fused with them or not."""
    fields = {"lora_target_modules": ALL, "fused_lora": str(fused).lower()}
    return paced(sft("single", rows, gb=gb, **fields))


def captured(one: Variant, captures: bool = True) -> Variant:
    """Returns a variant of recipes/sft.py whose micro-batches are captured, or not.

    A run as short as a benchmark's does not capture by itself. Every size is captured when it comes
    again, and the graphs' pool is memory besides.
    """
    fields = one.fields | {"captured_step": str(captures).lower()}
    return paced(one, fields=fields, warm=WARM_CAPTURED)


_QLORA = {"longest": 1024, "shape": LLAMA_7B, "load_in_4bit": True}
_R32 = {"r": 32, "lora_alpha": 64}
_FULL = {"longest": 4096, "shortest": 4096, "shape": "llama3-8b"}
# The cheapest and most informative first. With `--gb 135` a group is what one question compares.
PEERS = {
    "sft.py bf16, 20 rows": captured(VARIANTS["sft.py bf16, 20 rows"]),
    "Unsloth bf16, packed, 20 rows": unsloth(QVO, 20, 24),
    "trl bf16, packed, FA2, Liger, 20 rows": trl(QVO, 20, 22),
    "sft.py bf16, all linears, 20 rows": captured(all_linears(20, 24, fused=True)),
    "sft.py bf16, all linears, 20 rows, LoRA not fused": captured(all_linears(20, 24, fused=False)),
    "Unsloth bf16, packed, all linears, 20 rows": unsloth(ALL, 20, 24),
    "sft.py bf16, all linears, 64 rows": paced(VARIANTS["sft.py bf16, all linears, 64 rows"]),
    "sft.py bf16, all linears, 64 rows, LoRA not fused": all_linears(64, 36, fused=False),
    "Unsloth bf16, packed, all linears, 64 rows": unsloth(ALL, 64, 50),
    "sft.py bf16, 64 rows": paced(VARIANTS["sft.py bf16, 64 rows"]),
    "Unsloth bf16, packed, 64 rows": unsloth(QVO, 64, 50),
    "trl bf16, packed, FA2, Liger, 64 rows": trl(QVO, 64, 44),
    "sft.py QLoRA, 7B, kept activations, 4 rows": captured(qlora(4, 30)),
    "sft.py QLoRA, 7B, kept activations, 11 rows": captured(qlora(11, 50)),  # tokens of 4 full rows
    "Unsloth QLoRA, 7B, packed, 4 rows": unsloth(ALL, 4, 32, _R32, **_QLORA),
    "sft.py QLoRA fp8, 7B, kept activations, 4 rows": captured(qlora(4, 32, "fp8")),
    "sft.py QLoRA fp8, 7B, kept activations, 11 rows": captured(qlora(11, 52, "fp8")),
    "sft.py QLoRA, 7B, kept activations, 16 rows": qlora(16, 52),
    "sft.py QLoRA, 7B, kept activations, 42 rows": qlora(42, 110),  # tokens of 16 full rows
    "sft.py QLoRA fp8, 7B, kept activations, 42 rows": qlora(42, 118, "fp8"),
    "sft.py bf16, 8B, 2 full rows of 4096": paced(
        sft("single", 2, 4096, 68, lora_target_modules=ALL), **_FULL
    ),
    "Unsloth bf16, 8B, 2 full rows of 4096": unsloth(ALL, 2, 60, **_FULL),
    "sft.py fp8, 8B, 2 full rows of 4096": paced(
        sft("fp8", 2, 4096, 68, lora_target_modules=ALL), **_FULL
    ),
    "Unsloth QLoRA, 7B, packed, 16 rows": unsloth(ALL, 16, 90, _R32, **_QLORA),
}


_FUSED_7B = {
    f"{name}, LoRA {'' if fused else 'not '}fused": one._replace(
        fields=one.fields | {"fused_lora": str(fused).lower()}
    )
    for name, one in PEERS.items()
    if name.startswith("sft.py QLoRA,")
    for fused in (True, False)
}
FUSED_LORA = _FUSED_1B | _FUSED_7B

# those whose steps have few tokens, and those whose kernels take the GPU a short time
SHORT = {
    name: (PEERS | VARIANTS)[name]
    for name in (
        *("sft.py bf16, 20 rows", "sft.py bf16, all linears, 20 rows"),
        *(f"sft.py QLoRA, 7B, kept activations, {rows} rows" for rows in (4, 11)),
        *("sft.py fp8, 64 rows", "sft.py fp8, all linears, 64 rows"),
    )
}


class Family(NamedTuple):
    """A shape beside Llama's: how it is called, and its LoRA targets.

    `gb` is what recipes/sft.py, Unsloth and trl reserve. Without `flash` FlashAttention-2 lacks
    what the attention needs, and the peers pad the rows. `waits` says that the GPU waits for the
    host, so a run of recipes/sft.py captures its steps.
    """

    title: str
    targets: list[str]
    gb: tuple[int, int, int]
    slow: bool = False
    flash: bool = True
    waits: bool = False


# by the name of the shape, the cheapest and most informative first
FAMILY_OF = {
    "qwen3-1.7b": Family("Qwen3-1.7B", QVO, (30, 30, 28)),
    "gemma3-1b": Family("Gemma-3-1B", QVO, (30, 25, 20), waits=True),
    "olmo3-1.5b": Family("OLMo-3, 1.5B", QVO, (22, 24, 22)),
    "qwen3-30b-a3b-6-layers": Family("Qwen3-30B-A3B, 6 layers", QVO, (30, 36, 36), slow=True),
    "qwen3.5-2b": Family("Qwen3.5-2B", QVO, (40, 40, 40)),
    "phi4-mini": Family("Phi-4-mini", ["qkv_proj", "o_proj"], (42, 46, 46)),
    "gpt-oss-20b-4-layers": Family(
        "gpt-oss-20b, 4 layers", QVO, (30, 44, 50), slow=True, flash=False
    ),
}


def family_variants(shape: str, family: Family) -> dict[str, Variant]:
    """Returns recipes/sft.py, trl and Unsloth on a shape, with about as many tokens a step."""
    more = {"shape": shape, **(SLOW if family.slow else PACE)}
    targets, (own, unsloths, trls) = family.targets, family.gb
    mine = paced(sft("single", 32, gb=own, lora_target_modules=targets), **more)
    if family.waits:
        mine = captured(mine)
    packed, flash = (", packed", ", FA2") if family.flash else ("", "")
    return {
        f"sft.py bf16, {family.title}, 32 rows": mine,
        f"Unsloth bf16, {family.title}{packed}, 20 rows": unsloth(targets, 20, unsloths, **more),
        f"trl bf16, {family.title}{packed}{flash}, Liger, 20 rows": trl(
            targets, 20, trls, family.flash, **more
        ),
    }


FAMILIES = {
    name: variant
    for shape, family in FAMILY_OF.items()
    for name, variant in family_variants(shape, family).items()
}
# pairs with and without captured_step, the cheapest first
CAPTURED = {
    f"{name}{', steps captured' if captures else ', steps not captured'}": captured(one, captures)
    for name, one in SHORT.items()
    for captures in (False, True)
}
# a name that is also in VARIANTS or PEERS means that one
EVERY = CAPTURED | PEERS | FAMILIES | FUSED_LORA | VARIANTS
