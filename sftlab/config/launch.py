"""Which launch config does this process run under, and can this machine run it?

`accelerate launch` hands its config to the script in environment variables. Only this module reads
them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from sftlab.config.launch_file import read_launch_config
from sftlab.cpu_cores import cpu_cores

PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}
COMPUTE_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}
FP8_CAPABILITY = (8, 9)
BF16_CAPABILITY = (8, 0)
# The variables that hold a launch config begin with these.
_EXPORTED = ("ACCELERATE_", "FSDP_", "CUDA_VISIBLE_DEVICES")
# what accelerate exports where the launch config compiles nothing
_NO_DYNAMO = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
)


@dataclass(frozen=True)
class Launch:
    """What the launch config asks for.

    `precision` is fp32, fp16, bf16 or fp8, or None without a launcher. `strategy` is single, ddp or
    fsdp. `settings` holds the environment variables for run.json.
    """

    precision: str | None
    strategy: str
    world_size: int
    local_world_size: int
    hides_gpus: bool
    settings: dict[str, str]

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Launch":
        """Read the launch config that `accelerate launch` exported; one process without it."""
        world_size = int(env.get("WORLD_SIZE", 1))
        fsdp = env.get("ACCELERATE_USE_FSDP") == "true"
        precision = env.get("ACCELERATE_MIXED_PRECISION")
        return cls(
            precision=None if precision is None else PRECISIONS[precision],
            strategy="fsdp" if fsdp else "ddp" if world_size > 1 else "single",
            world_size=world_size,
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            hides_gpus=env.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
            or env.get("ACCELERATE_USE_CPU", "").lower() == "true",
            settings={
                k: v for k, v in sorted(env.items()) if k.startswith(("ACCELERATE_", "FSDP_"))
            },
        )

    def facts(self) -> dict:
        """Returns the launch config for run.json."""
        return asdict(self)


def exported(
    config_file: str | os.PathLike, flags: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Returns the variables that `accelerate launch` would export, without launching.

    accelerate itself reads `config_file` and `flags`, but for one plain process, whose variables
    are known: accelerate imports torch. Raises ValueError for a file that is missing or malformed.
    """
    config, flags = read_launch_config(config_file), dict(flags or {})
    for name in {"num_processes", "num_machines"} & flags.keys():
        if not str(flags[name]).isdecimal() or int(flags[name]) < 1:
            raise ValueError(f"--{name} {flags[name]}: expected a whole number of at least 1")
    if config.get("mixed_precision") is False:  # YAML reads an unquoted no so
        flags.setdefault("mixed_precision", "no")
    processes = int(flags.get("num_processes") or config.get("num_processes") or 1)
    if config["distributed_type"] == "MULTI_CPU" and processes > 1:
        raise ValueError(
            f"{config_file}: distributed_type MULTI_CPU starts its {processes} processes under MPI "
            "alone: use accelerate_configs/cpu_ddp.yaml"
        )
    if config["distributed_type"] == "NO" and processes > 1:
        raise ValueError(
            f"{config_file}: distributed_type NO starts one process, and {processes} are asked "
            "for: use accelerate_configs/ddp.yaml, or cpu_ddp.yaml on a CPU"
        )
    if config.get("use_cpu") in (True, "yes", "true"):
        flags.setdefault("gpu_ids", ",".join(["-1"] * max(2, processes)))
    if (known := _of_one_process(config, flags)) is not None:
        return known
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = [f"--{name}={value}" for name, value in flags.items()]
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(config_file), *words, "sft.py"]
    )
    arguments, *_ = _validate_launch_command(arguments)
    with _environment({}):
        env = prepare_multi_gpu_env(arguments)
    kept = {k: v for k, v in env.items() if k.startswith(_EXPORTED)}
    processes, machines = arguments.num_processes, arguments.num_machines or 1
    if machines > processes:
        raise ValueError(
            f"{machines} machines cannot share {processes} process{'es' * (processes > 1)}: "
            "--num_processes counts those of all machines"
        )
    return kept | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes // machines),
    }


def _of_one_process(
    config: Mapping[str, object], flags: Mapping[str, object]
) -> dict[str, str] | None:
    """Returns the variables of one process in fp32, fp16 or bf16; None for any other launch."""
    asked = {name: value for name, value in config.items() if value is not None} | dict(flags)
    precision = asked.pop("mixed_precision", "no")
    counts = {str(asked.pop(name, None)) for name in ("num_processes", "num_machines")}
    gpus = asked.pop("gpu_ids", "all")
    plain = {*asked} <= {"compute_environment", "distributed_type", "main_process_port"}
    kinds, precisions = ("NO", "MULTI_GPU"), ("no", "fp16", "bf16")
    if not plain or counts != {"1"} or precision not in precisions:
        return None
    if asked["distributed_type"] not in kinds:
        return None
    return {
        **({} if gpus == "all" else {"CUDA_VISIBLE_DEVICES": str(gpus)}),
        "ACCELERATE_MIXED_PRECISION": str(precision),
        **_NO_DYNAMO,
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
    }


@contextmanager
def launched(variables: Mapping[str, str]) -> Iterator[Launch]:
    """Put the variables of `exported` into os.environ, and give the launch config they make.

    Recipes parsed inside see this launch config. Nothing is launched.
    """
    with _environment({k: v for k, v in variables.items() if k.startswith(_EXPORTED)}):
        yield Launch.from_environment(variables)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Replace any launch config in os.environ by `variables` for a while."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(_EXPORTED)]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def force_single_process(launch: Launch) -> None:
    """Make a launch of one process a plain single process on one device.

    torchrun's variables would make it DDP with itself, and several visible GPUs `nn.DataParallel`.
    Call this before accelerate is used.
    """
    if launch.strategy != "single":
        return
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    visible = "-1" if launch.hides_gpus else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def check_devices(launch: Launch) -> None:
    """Raise ValueError where this machine has too few devices or lacks the precision."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        if launch.strategy == "fsdp":
            raise ValueError(
                "FSDP needs GPUs and this machine shows none (accelerate would run DDP on CPUs "
                "without a word): use accelerate_configs/cpu_ddp.yaml for several CPU processes"
            )
        if (
            launch.precision is not None
            and not launch.hides_gpus
            and not torch.accelerator.is_available()
        ):
            raise ValueError(
                "the launch config asks for a GPU and this machine shows none: use "
                "accelerate_configs/cpu.yaml (one process) or cpu_ddp.yaml (two)"
            )
        if launch.precision in ("fp16", "fp8"):
            raise ValueError(
                f"{launch.precision} does not run on a CPU: use fp32 (mixed_precision: 'no') or "
                "bf16, or a GPU"
            )
        return
    if launch.local_world_size > gpus:
        raise ValueError(
            f"the launch config starts {launch.local_world_size} processes on this machine, which "
            f"shows {gpus} GPU{'s' if gpus > 1 else ''}: pass --num_processes {gpus}"
        )
    check_precision(
        launch.precision, torch.cuda.get_device_capability(0), torch.cuda.get_device_name(0)
    )


def check_precision(precision: str | None, capability: tuple[int, int], name: str) -> None:
    """Raise ValueError where a GPU of this compute capability lacks the precision."""
    needed = {"fp8": FP8_CAPABILITY, "bf16": BF16_CAPABILITY}.get(precision or "", (0, 0))
    if capability < needed:
        instead = "fp16" if capability < BF16_CAPABILITY else "bf16 or fp16"
        raise ValueError(
            f"{precision} needs compute capability {needed[0]}.{needed[1]} or newer; {name} has "
            f"{capability[0]}.{capability[1]}: use {instead}"
        )


def use_all_cpu_cores(launch: Launch) -> None:
    """Give each CPU process its share of the cores; accelerate gives each one thread."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, cpu_cores() // launch.local_world_size))
