"""The start of a server: checks, memory plan, weights, compilation.

`check` does all that a mistake of the user can end, and the server opens no port before
it returns. `start` loads the weights while the programs compile, and makes the engine.

    check   checkpoint, tokenizer and template, mesh, options, compile cache, memory;
            compiles the largest programs, which tell how much memory they need
    start   weights, shard by shard | the other programs, in threads
            then the decode state; every program runs once
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax

from ladder_jax import checkpoint, loading, sharding
from ladder_jax.arguments import ENVIRONMENT, FLAT, POSITIONAL
from ladder_jax.config import Config, ConfigError, Decode, Mesh, from_meta, to_bytes
from ladder_jax.data.chat import ChatEncoder
from ladder_jax.data.tokenizer import Tokenizer, from_json
from ladder_jax.decode_weights import prepare_weights
from ladder_jax.hardware import channel, compile_cache
from ladder_jax.hardware.compilations import Compilations
from ladder_jax.hardware.distributed import JOIN_TIMEOUT, join
from ladder_jax.hardware.memory import device_memory, local_devices
from ladder_jax.serve import compilation, hosts, memory
from ladder_jax.serve.design import Design, design
from ladder_jax.serve.engine import Engine
from ladder_jax.server.start_progress import Report, Stages, silent

EXCHANGE_SECONDS = 3600.0  # for the slowest process; a lost one is noticed before


@dataclass(frozen=True)
class Arguments:
    """Model, memory and processes"""

    checkpoint: str = field(metadata=POSITIONAL)
    """A run's folder, its checkpoints folder, or the folder of one step."""
    step: int | None = None
    """The step of the checkpoint. None: the newest."""
    tensor: int | None = None
    """Devices to shard the model over. None: 1; all of them, if there are several
    processes; for desync and dtp, as in training."""
    devices: int | None = None
    """Emulate this many devices on the CPU, in each process."""
    device_memory: str | None = None
    """Memory of one device that the server may take, such as 14GiB. None: all that is
    free."""
    compile_cache: str | None = None
    """The folder for compiled programs, which make the next start fast; none: no such
    folder. None: ladder_jax/compiled in $XDG_CACHE_HOME, or in ~/.cache."""
    distributed: bool = field(default=False, metadata=ENVIRONMENT)
    """Serve with the devices of several processes. Start the same command on every
    machine; process 0 answers HTTP requests. On a TPU pod, under Slurm or MPI, each
    process learns its number; elsewhere give the next three options."""
    coordinator: str | None = field(default=None, metadata=ENVIRONMENT)
    """The address HOST:PORT of process 0, to which the others connect."""
    processes: int | None = field(default=None, metadata=ENVIRONMENT)
    """The number of processes."""
    process: int | None = field(default=None, metadata=ENVIRONMENT)
    """The number of this process, from 0."""
    join_timeout: float = field(default=JOIN_TIMEOUT, metadata=ENVIRONMENT)
    """Seconds to wait until all processes have started."""
    lost_after: float = field(default=channel.LOST_AFTER, metadata=ENVIRONMENT)
    """Seconds after which a process that does not answer is lost, and the server
    ends."""
    decode: Decode = field(
        default_factory=lambda: Decode(
            slots=16, max_logprobs=20, max_stop_ids=16, max_logit_bias=300
        ),
        metadata=FLAT,
    )


class Group(NamedTuple):
    """The processes of a server, if there are several."""

    channel: channel.Channel
    watch: channel.Watch


@dataclass
class Checked:
    """A server whose arguments are good; nothing is loaded yet."""

    arguments: Arguments
    config: Config
    step: int | None  # of the checkpoint; None: its folder's name is no number
    folder: str  # of the checkpoint
    digest: str  # of its JSON: configuration, tokenizer
    tokenizer: Tokenizer
    design: Design
    plan: memory.MemoryPlan
    limit: int | None  # bytes of a device that are free; None: unknown
    cache: compile_cache.CompileCache
    jobs: Sequence[compilation.Job]  # programs that are still to be compiled
    programs: Sequence[memory.ProgramMemory]  # of those that are compiled
    compilations: Compilations  # of this process so far
    stages: Stages
    group: Group | None  # None: this process is the only one

    @property
    def leads(self) -> bool:
        """Whether this process answers HTTP requests."""
        return self.group is None or self.group.channel.number == 0


@dataclass
class Ready:
    """A server that can answer: its engine has all its programs.

    engine: its thread does not run yet. In a process that does not lead, it is a
      hosts.FollowingEngine.
    seconds: by stage, and "total".
    compiled, from_cache: how many programs were compiled or loaded from the compile
      cache at the start, and how many of them were loaded.
    compilations: counts the programs that are compiled from now on: none should be.
    """

    engine: Engine
    checked: Checked
    seconds: Mapping[str, float]
    compiled: int
    from_cache: int
    compilations: Compilations

    def line(self) -> str:
        """What the start did and took."""
        parts = [f"{name} {took:.1f} s" for name, took in self.seconds.items()]
        return (
            f"started in {parts.pop().removeprefix('total ')}: {', '.join(parts)}; "
            f"{self.compiled} programs, {self.from_cache} of them from the compile "
            "cache"
        )

    def follow(self) -> None:
        """Takes the steps of process 0 until it ends; see FollowingEngine.follow."""
        assert isinstance(self.engine, hosts.FollowingEngine)
        self.engine.follow()
        self.end()

    def end(self) -> None:
        """Says that the other processes may go now. Call it after engine.close()."""
        if self.checked.group is not None:
            self.checked.group.watch.end()


def prepare(arguments: Arguments, report: Report = silent) -> Ready:
    """`check` and `start`."""
    return start(check(arguments, report))


# ---------------------------------------------------------------- the checks


def check(
    arguments: Arguments,
    report: Report = silent,
    first: Callable[[], object] = lambda: None,
) -> Checked:
    """Checks everything, and plans the memory. Nothing is allocated on the devices.

    Where there are several processes, it must run before anything asks JAX for devices,
    and it returns or raises in all of them alike.

    Args:
      report: gets how far it is.
      first: checks of the caller in the process that leads, such as the HTTP port.
    Raises ConfigError for a mistake, ValueError for a damaged checkpoint, Missing
    that names the processes which did not start.
    """
    stages = Stages(report)
    group = _join(arguments)

    def read() -> Checked:
        if group is None or group.channel.number == 0:
            first()
        return _read(arguments, stages, group)

    checked = _together(group, "arguments", read, _digest)
    return _together(group, "memory", lambda: _compile_largest(checked))


T = TypeVar("T")


def _together(
    group: Group | None,
    name: str,
    work: Callable[[], T],
    digest: Callable[[T], dict[str, str]] = lambda _: {},
) -> T:
    """Returns work(), whose digest must be the same in all processes.

    If it raises in one of them, this function raises in all.
    """
    if group is None:
        return work()
    outcome: dict[str, Any]
    try:
        result = work()
        mistake, outcome = None, dict(digest=digest(result))
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        mistake, outcome = error, dict(problem=text)
    others = group.channel.exchange(name, json.dumps(outcome), EXCHANGE_SECONDS)
    try:
        if mistake is not None:
            raise mistake
        _compare([json.loads(other) for other in others])
    except Exception:
        group.watch.end()
        raise
    return result


def _join(arguments: Arguments) -> Group | None:
    """Joins the other processes; None if there are none."""
    names = ("coordinator", "processes", "process")
    values = {name: getattr(arguments, name) for name in names}
    if not arguments.distributed:
        for name, value in values.items():
            if value is not None:
                text = f"{name}={value!r} is not accepted without --distributed"
                raise ConfigError(text)
        return None
    join(**values, timeout=arguments.join_timeout)
    if jax.process_count() == 1:
        return None
    made = channel.Channel()
    return Group(made, channel.Watch(made, arguments.lost_after))


def _read(arguments: Arguments, stages: Stages, group: Group | None) -> Checked:
    """Checks all that needs no compilation."""
    with stages.stage("checks"):
        limit = arguments.device_memory
        asked = None if limit is None else to_bytes(limit, "device_memory")
        where, meta = checkpoint.find(arguments.checkpoint, arguments.step)
        config = from_meta(meta, where)
        tokenizer = from_json(meta["tokenizer"])
        ChatEncoder(tokenizer)
        mesh = _mesh(arguments, config, meta.get("tensor", 1))
        plan = design(config.model, mesh, arguments.decode, tokenizer)
        free = device_memory(mesh)
        memory_plan = memory.plan(plan)
        memory.check(memory_plan, plan, _least(asked, free))
        cache = compile_cache.use(arguments.compile_cache)
        stages.say(cache.line)
    return Checked(
        arguments=arguments,
        config=config,
        step=int(where.name) if where.name.isdigit() else None,
        folder=str(where),
        digest=hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:12],
        tokenizer=tokenizer,
        design=plan,
        plan=memory_plan,
        limit=_least(asked, free),
        cache=cache,
        jobs=compilation.jobs(plan),
        programs=[],
        compilations=Compilations(),
        stages=stages,
        group=group,
    )


def _compile_largest(checked: Checked) -> Checked:
    """Plans the memory with what the largest programs take, which it compiles."""
    plan, stages = checked.design, checked.stages
    largest = [job for job in checked.jobs if job.is_largest]
    with stages.stage("largest programs", len(largest)) as done:
        checked.programs = compilation.compile_all(largest, done)
    checked.jobs = checked.jobs[len(largest) :]
    _plan_programs(checked)
    stages.say(f"{plan.capacity.report(plan.spec.kv_dtype, plan.spec.page_kernel)}")
    stages.say(f"memory of a device: {checked.plan.text()}")
    return checked


def _mesh(arguments: Arguments, config: Config, trained: int) -> jax.sharding.Mesh:
    """The devices of the server. Every process must have one of them."""
    tensor, several = arguments.tensor, jax.process_count() > 1
    if tensor is None and several:
        tensor = jax.device_count()
    mesh_config = None if tensor is None else Mesh(data=1, tensor=tensor)
    mesh = loading.make_mesh(config, trained, mesh_config)
    sharding.check_fits(config.model, mesh)
    used = {device.process_index for device in mesh.devices.flat}
    if several and len(used) < jax.process_count():
        raise ConfigError(
            f"tensor={tensor} is not accepted: the {jax.process_count()} processes "
            f"have {jax.device_count()} devices, and each must have a part of the model"
        )
    return mesh


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _plan_programs(checked: Checked) -> None:
    """Adds what the compiled programs take to the plan, and checks it again."""
    known = checked.programs
    count = len(known) + len(checked.jobs)
    checked.plan = memory.with_programs(checked.plan, known, count)
    memory.check(checked.plan, checked.design, checked.limit)


def _digest(checked: Checked) -> dict[str, str]:
    """What must be the same in all processes, as short texts."""
    options = dataclasses.asdict(checked.design.options)
    devices = {device.device_kind for device in local_devices(checked.design.mesh)}
    return dict(
        checkpoint=f"step {checked.step}, {checked.digest}",
        options=json.dumps(options, sort_keys=True),
        mesh=str(dict(checked.design.mesh.shape)),
        devices=", ".join(sorted(devices)),
    )


def _compare(outcomes: list[dict[str, Any]]) -> None:
    """Raises ConfigError if a process has a problem, or differs from process 0."""
    for number, outcome in enumerate(outcomes):
        if "problem" in outcome:
            raise ConfigError(f"process {number}: {outcome['problem']}")
    for number, outcome in enumerate(outcomes):
        for name, value in outcomes[0]["digest"].items():
            if outcome["digest"][name] != value:
                raise ConfigError(
                    f"process {number} has {name} {outcome['digest'][name]}, and "
                    f"process 0 has {value}: give all processes the same"
                )


# ---------------------------------------------------------------- weights, programs


def start(checked: Checked) -> Ready:
    """Loads the weights, compiles all programs and makes the engine.

    Raises ConfigError if it turns out that the memory does not suffice, ValueError if
    the weights cannot be read.
    """
    stages, jobs = checked.stages, checked.jobs
    with stages.stage("weights and programs", len(jobs)) as done:
        with compilation.compiling(jobs, done) as wait:
            began = time.perf_counter()
            weights = load_weights(checked)
            stages.seconds["weights"] = time.perf_counter() - began
            programs = wait()
    checked.programs, checked.jobs = [*checked.programs, *programs], []
    _plan_programs(checked)
    with stages.stage("engine") as _:
        engine = _engine(checked, weights)
        del weights
    with stages.stage("first runs") as done:
        engine.warm_up(done.each)
    if problem := checked.cache.keep():
        stages.say(problem)
    made = checked.compilations
    ready = Ready(
        engine=engine,
        checked=checked,
        seconds=stages.all_seconds(),
        compiled=made.total,
        from_cache=made.from_cache,
        compilations=Compilations(),
    )
    if checked.group is not None:  # the slowest process has compiled everything, too
        checked.group.channel.exchange("ready", "", EXCHANGE_SECONDS)
        checked.group.watch.starting = False
    stages.say(ready.line())
    return ready


def load_weights(checked: Checked) -> Any:
    """Reads the weights onto the mesh, each shard from the checkpoint to its device.

    They are cast while they are read. Then the layers are split, one parameter after
    the other, so that only one exists twice.
    """
    shapes = memory.loaded_model(checked.design)
    model = checkpoint.load_model(checked.folder, shapes)
    return prepare_weights(checked.design.spec, model, consume=True)


def _engine(checked: Checked, weights: Any) -> Engine:
    plan = checked.design
    arguments = (
        weights,
        plan.model_config,
        plan.mesh,
        checked.arguments.decode,
        checked.tokenizer,
    )
    if checked.group is None:
        return Engine(*arguments)
    kind = hosts.LeadingEngine if checked.leads else hosts.FollowingEngine
    return kind(*checked.group, *arguments)


def leave(status: int) -> NoReturn:
    """Ends this process at once: an ordinary exit would wait for lost processes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)
