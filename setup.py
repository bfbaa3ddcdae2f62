"""The part of the packaging that pyproject.toml cannot say: four folders of the tree become two import packages."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(".", include=["pocl", "pocl.*"]),
        *find_packages("kernels"),
        "pocl.recipes",  # data: the shipped recipes lie inside the installed package
        "pocl.shipped.benchmarks",  # for `pocl bench`; `benchmarks` is no name to take from everybody else
    ],
    package_dir={
        "pocl_kernels": "kernels/pocl_kernels",
        "pocl.recipes": "recipes",
        "pocl.shipped.benchmarks": "benchmarks",
    },
)
