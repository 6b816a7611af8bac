"""Triton's kernels under its interpreter, without a GPU: tests of five files in one process."""

from triton_interpreter import interpret_tests, starts_interpreter, with_triton

OF_TEST_KERNELS = "gradients or frozen_head or slopes"
FILES = "test_kernels", "test_four_bit_kernel", "test_float8_mlp_kernel", "test_gated_lora_kernel"
FILES += ("test_many_copies",)


@with_triton
@starts_interpreter
def test_the_kernels_run_under_tritons_interpreter():
    parts = (
        f"({FILES[0]} and ({OF_TEST_KERNELS}))",
        *FILES[1:3],
        "added_up",
        "each_matrix or in_one_thing",
    )
    said = interpret_tests(*(f"tests/{name}.py" for name in FILES), "-k", " or ".join(parts))
    assert "75 passed, 17 skipped" in said
