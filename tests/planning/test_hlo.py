"""Counts of operations and transfers in compiled programs, against what they must be."""

import json
import os
import subprocess
import sys

import pytest

from egrpo_jax.planning import hlo
from tests import programs

CUBE = 2 * 64**3  # operations of a product of two 64 x 64 matrices
EXPECTED = {  # operations, bytes received by kind, whether in a loop, loops of unknown turns
    "product": [CUBE, {}, False, 0],
    "scan": [7 * CUBE, {}, False, 0],
    "nested": [15 * CUBE, {}, False, 0],
    "backward": [21 * CUBE, {}, False, 0],
    "unknown": [CUBE, {}, False, 1],
    # 3 x 3 taps on 8 x 8 pixels: along an axis the outer two of three meet 7 of 8 pixels.
    "convolution": [2 * 2 * 4 * 16 * (8 + 7 + 7) ** 2, {}, False, 0],
    "gather": [5 * 2 * 8 * 64 * 64, {"all-gather": 5 * 3 * 16 * 64 * 4}, True, 0],
    "sum": [0, {"all-reduce": 2 * 0.75 * 16 * 64 * 4}, False, 0],
    "scatter": [0, {"reduce-scatter": 0.75 * 16 * 64 * 4}, False, 0],
    "shift": [0, {"collective-permute": 16 * 64 * 4}, False, 0],
}


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "tests.planning.measure_programs"]
    done = subprocess.run(command, cwd=programs.ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_compiled_programs(measured, name):
    assert measured[name] == EXPECTED[name]


TPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}, num_partitions=8

%cond (carry.1: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(19), metadata={op_name="x"}
  %carry.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%inner (part.1: bf16[1,16,64]) -> bf16[1,64,64] {
  %part.1 = bf16[1,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1,64,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%part.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
}

%body (carry.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry.2 = (s32[]{:T(128)}, /*index=1*/f32[8]{0}) parameter(0)
  %part = bf16[1,16,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %gathered = bf16[1,64,64]{2,1,0} fusion(%part), kind=kOutput, calls=%inner
  %heads = bf16[24,100,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %scores = f32[24,100,100]{2,1,0} convolution(%heads, %heads), window={size=24 stride=23 pad=0_0 lhs_dilate=24}, dim_labels=0bf_0oi->0bf
  %splash_mha_fwd_residuals.1 = (f32[1], bf16[24,100,128]) custom-call(%bound, %heads, %heads, %heads), custom_call_target="tpu_custom_call", metadata={
}}
  %bound = s32[] constant(1)
  %mine.3 = f32[8]{0} custom-call(%part), custom_call_target="tpu_custom_call"
  %mean = f32[8]{0} all-reduce(%mine.3), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  ROOT %tuple.2 = (s32[], f32[8]) tuple(%bound, %mean)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %copy = s32[]{:T(128)} copy(%zero)
  %start = (s32[], f32[8]) tuple(%copy, %p)
  %while.1 = (s32[], f32[8]) while(%start), condition=%cond, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


FUSED = "fusion(%part), kind=kOutput, calls=%inner"
ON_SPARSE_CORE = 'call-start(%part), async_execution_thread="sparsecore", to_apply=%inner'


@pytest.mark.parametrize("transfer", [FUSED, ON_SPARSE_CORE])
def test_text_as_the_compiler_for_tpus_writes_it(transfer):
    """A loop without `known_trip_count`, a product of batches as a convolution, transfers in others, kernels."""
    work = hlo.measure(hlo.parse(TPU.replace(FUSED, transfer)))
    heads = 2 * 24 * 100 * 100 * 128
    assert work.flops == 19 * (heads + 2 * heads)
    assert work.wire == {"all-gather": 19 * 3 * 16 * 64 * 2, "all-reduce": 19 * 2 * 0.75 * 32}
    assert work.unknown_kernels == {"mine.3": 19}
    assert [(each.kind, each.whole, each.runs) for each in work.collectives] == [
        ("all-gather", 64 * 64 * 2, 19),
        ("all-reduce", 32, 19),
    ]


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)2}", 2),
        ("{}", 8),
    ],
)
def test_members_of_a_transfer(groups, members):
    text = TPU.replace("mesh['a'=2,'b'=4] {'b'}", groups)
    found = hlo.measure(hlo.parse(text)).wire["all-reduce"]
    assert found == 19 * 2 * 32 * (members - 1) / members
