# flawmask serve. On Linux, pip takes PyTorch for CUDA, several GB. For CPUs, name PyTorch's index for CPUs:
#     docker build --build-arg INDEX_URL=... -t flawmask .
FROM python:3.12-slim AS build
ARG INDEX_URL=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE requirements-dev.lock ./
COPY src src
# The versions that the tests pass on. (Only what the extra needs is installed, without the tools.)
RUN sed -e '/^ /d' -e 's/ *\\$//' requirements-dev.lock > constraints.txt
RUN python -m venv /venv
RUN /venv/bin/pip install --no-cache-dir --constraint constraints.txt ${INDEX_URL:+--extra-index-url "$INDEX_URL"} ".[serve]"

FROM python:3.12-slim
COPY --from=build /venv /venv
RUN useradd --system --uid 10001 --no-create-home flawmask
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["/venv/bin/python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
ENTRYPOINT ["/venv/bin/flawmask", "serve", "--host", "0.0.0.0", "--token_file", "/run/secrets/token"]
CMD ["--model", "/models/best.pt"]
