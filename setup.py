from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# Everything `megalite data build` can use but for what is large or rare, which has an extra of its own.
data = ["tokenizers>=0.20.3", "numba>=0.61", "ftfy>=6.2", "py3langid>=0.4", "resiliparse>=0.15"]

setup(
    name="megalite",
    version="0.1.0",
    description="A small, provably right trainer for decoder-only language models",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megalite", "megalite.*", "data_tools", "data_tools.*"]),
        *find_packages("kernels", include=["megalite_kernels", "megalite_kernels.*"]),
    ],
    package_dir={"megalite_kernels": "kernels/megalite_kernels"},
    package_data={
        "megalite": ["py.typed"],
        "megalite_kernels": ["py.typed", "tiles/*/*.json"],
        "data_tools": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=2.0",
        "pyarrow>=17",
        "pydantic>=2.14",
        "safetensors>=0.4.5",
        "rich>=13.7.1",
        "zstandard>=0.22",
    ],
    extras_require={
        "tokenizers": ["tokenizers>=0.20.3"],
        "data": data,
        "hub": ["datasets>=4.0"],  # from which on a dataset cannot bring code along
        "trafilatura": ["trafilatura>=2.0", "lxml_html_clean>=0.4"],
        "fasttext": ["fasttext-wheel>=0.9.2"],
        "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6", "gcsfs>=2024.6"],
        "deepspeed": ["deepspeed>=0.19"],
        "dev": [
            *data,
            "tiktoken>=0.8",
            "transformers>=5.0",
            "deepspeed>=0.19",
            "megatron-core>=0.16.1",
            "triton>=3.6.0; platform_system == 'Linux'",
            "pytest>=8.0",
            "hypothesis>=6.100",
            "fsspec[http]>=2024.6",
            "s3fs>=2024.6",
            "gcsfs>=2024.6",
            "moto[s3]>=5.0",  # an S3 to read from; its server needs the next two
            "flask>=3.0",
            "flask-cors>=4.0",
            "ruff==0.17.6",
            "mypy==2.4.1",
        ],
    },
    entry_points={"console_scripts": ["megalite = megalite.cli:main"]},
)
