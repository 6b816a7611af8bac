"""Triton's kernels under its interpreter, without a GPU: tests of three files in one process."""

from triton_interpreter import interpret_tests, starts_interpreter, with_triton

OF_TEST_KERNELS = "gradients or frozen_head or slopes"
FILES = "test_kernels", "test_four_bit_kernel", "test_float8_mlp_kernel"


@with_triton
@starts_interpreter
def test_the_kernels_run_under_tritons_interpreter():
    of_files = f"({FILES[0]} and ({OF_TEST_KERNELS})) or {' or '.join(FILES[1:])}"
    said = interpret_tests(*(f"tests/{name}.py" for name in FILES), "-k", of_files)
    assert "73 passed, 17 skipped" in said
