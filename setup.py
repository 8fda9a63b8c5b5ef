from setuptools import find_packages, setup

setup(
    include_package_data=False,  # only what package_data lists: csrc is sources, not a package
    packages=find_packages(include=["sparsekit", "sparsekit.*"]) + find_packages("kernels"),
    package_dir={"sparsekit_kernels": "kernels/sparsekit_kernels"},
    package_data={
        "": ["py.typed"],
        "sparsekit_kernels": ["configs/*.json"],
        "sparsekit_kernels.cpu": ["csrc/*"],
    },
)
