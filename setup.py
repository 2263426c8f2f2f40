"""Packaging of psaq_mm: ``pip install -e .`` for users, ``make`` for everything else (see README.md)."""
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version():
    """What ``psaq_mm/version.py`` defines; importing the package would need what is to be installed."""
    namespace = {}
    exec((HERE / 'psaq_mm' / 'version.py').read_text(encoding='utf-8'), namespace)
    return namespace


def kernels():
    """The CPU kernels, where torch and a C++ compiler are at hand; without them the package computes the same slower.

    torch is at hand with ``pip install --no-build-isolation``.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    # Contracting a product and a sum into one would change bits; a rounding mode or a trap nobody sets, only speed.
    flags = ['-O3', '-fopenmp', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math']
    extension = CppExtension('psaq_mm.quantization._kernels', ['psaq_mm/csrc/fake_quantize.cpp'],
                             extra_compile_args=flags, extra_link_args=['-fopenmp'], optional=True)
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=BuildExtension.with_options(
        use_ninja=False, no_python_abi_suffix=True)))


setup(
    name='psaq_mm',
    version=read_version()['__version__'],
    description='Data-free quantization of OpenMMLab detectors, segmentors and timm classifiers (PSAQ-ViT V2)',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['psaq_mm', 'psaq_mm.*']),
    package_data={'psaq_mm.report': ['*.html']},
    python_requires='>=3.10',
    install_requires=[
        *(name + versions for name, versions in read_version()['REQUIRES'].items()),
        'torchvision',  # timm imports it
        'numpy',
        'packaging',
        'six',  # mmdet 3.3.0 imports it without declaring it
        'ftfy',  # so does mmsegmentation 1.2.2
        'regex',
        'matplotlib',
        'rich',
        'Jinja2',
        'scipy',
        'Pillow',
    ],
    extras_require={
        'deploy': ['onnx>=1.14', 'onnxruntime>=1.17', 'openvino>=2024.0'],
        'tensorrt': ['polygraphy>=0.49', 'tensorrt>=10.0'],
        'dev': ['hypothesis', 'mkdocs', 'pytest', 'pytest-timeout', 'pytest-xdist', 'ruff', 'tensorboard'],
    },
    **kernels(),
)
