"""Scheduled programs small enough to play by hand, as XLA's text, and their clock."""

# ruff: noqa: E501  XLA's lines are long
from ladder_jax.hardware.cost import Transfer
from ladder_jax.planner import hlo
from ladder_jax.planner import operations as ops
from ladder_jax.planner.timeline import Timeline, play

OVERLAPPED = """HloModule step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0:S(1)} parameter(1)
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="jit(f)/layer1/mlp/ppermute"}
  %dot = bf16[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/layer1/mlp/dot_general"}, backend_config={"estimated_cycles":"3000"}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %after = bf16[4,8]{1,0} add(%dot, %done), backend_config={"estimated_cycles":"1000"}
  ROOT %total = bf16[4,8]{1,0} all-reduce(%after), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(f)/last/psum"}
}
"""


def program(*lines: str) -> hlo.Module:
    """A module whose main computation has these instructions."""
    return hlo.parse(
        "HloModule step, is_scheduled=true, num_partitions=4\n\n"
        "ENTRY %main (x: f32[4]) -> f32[4] {\n"
        "  %x = f32[4]{0} parameter(0)\n" + "\n".join(lines) + "\n}\n"
    )


def compute(name: str, seconds: int, scope: str = "") -> str:
    return (
        f"  %{name} = f32[4]{{0}} add(%x, %x), "
        f'metadata={{op_name="jit(f)/{scope}/add"}}, '
        f'backend_config={{"estimated_cycles":"{seconds}"}}'
    )


def start(name: str, scope: str = "") -> str:
    return (
        f"  %{name} = (f32[4]{{0}}, f32[4]{{0}}) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, "
        f'metadata={{op_name="jit(f)/{scope}/ppermute"}}'
    )


def done(name: str, scope: str = "") -> str:
    return (
        f"  %{name}.done = f32[4]{{0}} collective-permute-done(%{name}), "
        f'metadata={{op_name="jit(f)/{scope}/ppermute"}}'
    )


def all_reduce(name: str, scope: str = "last") -> str:
    return (
        f"  %{name} = f32[4]{{0}} all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, "
        f'metadata={{op_name="jit(f)/{scope}/psum"}}'
    )


def fetch(name: str, seconds: int) -> str:
    """A prefetch that takes HBM so long: `play_seconds` gives a byte a second."""
    return f"  %{name} = (s8[{seconds}]{{0:S(1)}}, s8[{seconds}]{{0}}) copy-start(%x)"


def fetched(name: str, seconds: int) -> str:
    return f"  %{name}.done = s8[{seconds}]{{0:S(1)}} copy-done(%{name})"


def play_seconds(
    module: hlo.Module, transfer: Transfer | dict[str, Transfer], **options: object
) -> Timeline:
    """Plays a module: an instruction takes its cycles in seconds, and no HBM."""

    def cost(kind: str, groups: hlo.Groups, size: int) -> Transfer:
        return transfer[kind] if isinstance(transfer, dict) else transfer

    costs = ops.Costs(
        lambda instruction, _: float(instruction.cycles or 0),
        # Arrays of float32 are no traffic: prefetches alone use HBM.
        lambda size: float(size) if size % 4 else 0.0,
        cost,
        **options,
    )
    return play(module, costs)
