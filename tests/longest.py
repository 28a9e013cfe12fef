"""Which files of tests take longest, for conftest.py to begin with."""

#: Files that take longest, first: processes of pytest-xdist that take whole files then end at about the same time.
LONGEST = (
    "test_kernels_gpu_triton_versions.py",
    "test_engine_gpu_interpreted.py",
    "test_pi0_engine_demo_evaluate.py",
    "test_kernels_gpu_linear.py",
    "test_package_install.py",
    "test_kernels_gpu_attention.py",
    "test_pi0_engine_serving_ray.py",
)
