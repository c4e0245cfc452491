# An image of ssl3d for one user without rights: docker build -t ssl3d .
#
# With CUDA (the default): torch's wheels bring the CUDA runtime, so a slim Python image is enough, and the host gives the
# driver (docker run --gpus all). For CPUs alone: --build-arg TORCH_INDEX=ADDRESS, the address of PyTorch's index of CPU
# builds, as its site names it.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=timm,transformers
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/ssl3d
ENV PATH=/opt/ssl3d/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
# torch and torchvision come from one index, always together: a CPU build beside the other's CUDA build does not load.
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY ssl3d ssl3d
COPY proxies proxies
COPY benchmarks benchmarks
RUN pip install -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/ssl3d /opt/ssl3d
# Any user may write the cache, since clusters and `docker run --user` choose the number themselves.
RUN useradd --create-home --uid 1000 ssl3d && install --directory --mode 1777 /home/ssl3d/.cache && chmod 755 /home/ssl3d
ENV PATH=/opt/ssl3d/bin:$PATH HOME=/home/ssl3d PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER ssl3d
WORKDIR /work
ENTRYPOINT ["ssl3d"]
CMD ["--help"]
