# The environment of README.md: Python, the locked versions, and what they need of the system. The clone is mounted.
#
#     docker build --tag retort .
#     docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD":/retort retort dvc repro
#
# With another build of torch, for the CPU or an older driver (requirements/without-torch.lock), as pytorch.org shows it:
#
#     docker build --tag retort --build-arg TORCH="WORDS AFTER pip install" .
FROM python:3.12-slim

# git: DVC and the report read the revision. gcc and libc6-dev: torch.compile builds launchers of GPU kernels. The audio
# libraries, libsndfile and espeak-ng, come with the Python packages.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY requirements/run.lock requirements/without-torch.lock /requirements/
ARG TORCH=""
RUN if [ -z "$TORCH" ]; \
    then pip install --no-cache-dir --requirement /requirements/run.lock; \
    else pip install --no-cache-dir $TORCH \
        && pip install --no-cache-dir --requirement /requirements/without-torch.lock; \
    fi

# Any user may be given with --user, also one that the image does not know: a home that all can write, and a name.
RUN useradd --create-home --home-dir /home/retort retort && chmod 1777 /home/retort \
    && git config --system --add safe.directory /retort
ENV HOME=/home/retort USER=retort
USER retort
WORKDIR /retort
CMD ["dvc", "repro"]
