from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["sparsekit", "sparsekit.*"]) + find_packages("kernels"),
    package_dir={"sparsekit_kernels": "kernels/sparsekit_kernels"},
    package_data={
        "": ["py.typed"],
        "sparsekit_kernels": ["configs/*.json"],
        "sparsekit_kernels.cpu": ["csrc/*"],
    },
)
