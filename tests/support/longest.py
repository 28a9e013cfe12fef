"""Which files of tests take longest, for conftest.py to begin with."""

#: Files that take longest, first: processes of pytest-xdist that take whole files then end at about the same time.
LONGEST = (
    "kernels/gpu/test_triton_versions.py",
    "engine/test_gpu_interpreted.py",
    "demo/test_evaluate.py",
    "kernels/gpu/test_linear.py",
    "test_install.py",
    "test_without_torch.py",
    "kernels/gpu/test_attention.py",
    "serving/test_ray.py",
)
