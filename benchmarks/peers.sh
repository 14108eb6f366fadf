#!/usr/bin/env bash
# Makes the environments of the programs that we compare with, one folder each.
#
#   benchmarks/peers.sh [FOLDER]     default .peers; PYTHON names the interpreter
#
# llamacpp/bin also gets llama.cpp's own programs and libraries, built from the source that llama-cpp-python ships (needs cmake and
# a C++ compiler; a few minutes); llamacpp/llama.cpp keeps its converter.
set -euo pipefail

folder=${1:-.peers}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

environment() { # NAME REQUIREMENT...
  local name=$1
  shift
  [ -x "$folder/$name/bin/python" ] || "$python" -m venv "$folder/$name"
  "$folder/$name/bin/pip" install --quiet "$@"
}

environment llmcompressor \
  llmcompressor==0.14.0.1 compressed-tensors==0.19.0 torch==2.13.0 transformers==5.17.0 accelerate==1.15.0 \
  datasets==5.2.0 safetensors==0.8.0 numpy==2.4.6

environment gptqmodel \
  GPTQModel==7.7.0 Defuser==0.0.28 optimum==2.3.0 torch==2.14.1 torchao==0.18.0 transformers==5.24.0 \
  accelerate==1.15.0 datasets==5.2.0 safetensors==0.8.0 numpy==2.4.6

# mlx's packages for Linux: the "cpu" extra brings the backend
environment mlx 'mlx[cpu]==0.32.4' mlx-lm==0.32.2

environment llamacpp xllamacpp==2026.10.11549 numpy==2.4.6

programs=(llama-perplexity llama-quantize llama-imatrix)
if [ ! -x "$folder/llamacpp/bin/${programs[0]}" ]; then
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
  "$folder/llamacpp/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$build" llama-cpp-python==0.3.36
  tar -xzf "$build"/llama_cpp_python-*.tar.gz -C "$build" --strip-components 1
  rm -rf "$folder/llamacpp/llama.cpp"
  mv "$build/vendor/llama.cpp" "$folder/llamacpp/llama.cpp"
  source=$folder/llamacpp/llama.cpp
  cmake -S "$source" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF >"$build/log"
  cmake --build "$source/build" --parallel "$(nproc)" --target "${programs[@]}" >>"$build/log"
  for file in "${programs[@]}" $(cd "$source/build/bin" && ls lib*.so*); do
    ln -sf "$source/build/bin/$file" "$folder/llamacpp/bin/$file"
  done
fi
