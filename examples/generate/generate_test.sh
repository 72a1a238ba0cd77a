#!/usr/bin/env bash
# The main job as a user runs it: text comes out, the same seed gives the same
# text, and every mistake is one clear line and exit code 2.
set -uo pipefail
generate=examples/generate/generate
failures=0

fail() {
  echo "FAIL: $*"
  failures=$((failures + 1))
}

text=$("$generate" --prompt "She was" --max-tokens 80 --seed 3) ||
  fail "default model: exit code $?"
[[ $text == "She was"* ]] || fail "the prompt is not continued: $text"
[[ $text == *"tokens/s"* ]] || fail "no tokens/s: $text"
# A trained model writes English: common words turn up.
[[ $text =~ \ (the|and|of|to|a|in|her|it)\  ]] || fail "not English: $text"

body() { "$generate" "$@" | sed '/tokens\/s$/d'; }
first=$(body --prompt "She was" --max-tokens 80 --seed 3)
[[ $first == "$(body --prompt "She was" --max-tokens 80 --seed 3)" ]] ||
  fail "the same seed gave another text"
[[ $first != "$(body --prompt "She was" --max-tokens 80 --seed 4)" ]] ||
  fail "another seed gave the same text"
greedy=$(body --temperature 0 --max-tokens 40 --seed 1)
[[ $greedy == "$(body --temperature 0 --max-tokens 40 --seed 2)" ]] ||
  fail "greedy text depends on the seed"
[[ $(body --batch 3 --max-tokens 20 | grep -c '^--- ') == 3 ]] ||
  fail "--batch 3 does not print three texts"

# Weights quantised while loading: other text, and still English.
fp8=$("$generate" --weights fp8 --prompt "She was" --max-tokens 80 --seed 3) ||
  fail "--weights fp8: exit code $?"
[[ $fp8 =~ \ (the|and|of|to|a|in|her|it)\  ]] || fail "fp8 is not English: $fp8"

# A published fp8 checkpoint; its greedy tokens are deterministic.
ids() { "$generate" --model "tests/golden/$1" --prompt-ids 5,6,7 \
  --temperature 0 --max-tokens 8 | head -1; }
for model in qwen3_moe_fp8 qwen3_dense_tiny_fp8; do
  [[ $(ids $model) =~ ^([0-9]+ ){1,8}$ && $(ids $model) == $(ids $model) ]] ||
    fail "$model does not generate: $(ids $model)"
done

# The model's context of 2048 is where a text ends, not an error.
long=$("$generate" --temperature 1.5 --top-p 1 --max-tokens 5000) ||
  fail "a long text: exit code $?"
[[ ${#long} -gt 1000 ]] || fail "a long text has ${#long} characters"

expect_error() { # expect_error PART ARGUMENT...
  local part=$1 output code
  shift
  output=$("$generate" "$@" 2>&1 >/dev/null)
  code=$?
  [[ $code == 2 ]] || fail "$*: exit code $code, expected 2"
  [[ $(wc -l <<<"$output") == 1 ]] || fail "$*: not one line: $output"
  [[ $output == *"$part"* ]] || fail "$*: does not name $part: $output"
}
expect_error "--frobnicate" --frobnicate 1
expect_error "--top-p" --top-p 1.5
expect_error "--max-tokens" --max-tokens 0
expect_error "2147483647" --max-tokens 2147483648
expect_error "--max-tokens" --max-tokens 1e1
expect_error "--batch" --batch 2000000
expect_error "--prompt-ids: 256" --prompt-ids 1,256
expect_error "--prompt-ids" --prompt-ids 1,,2
expect_error "--model" --model ""
expect_error "--seed" --seed -1
expect_error "--seed" --seed " -1"
expect_error "--device" --device tpu
expect_error "--weights" --weights int4
expect_error "--prompt" --prompt
expect_error "/nonexistent" --model /nonexistent
expect_error "2048" --prompt "$(printf 'a%.0s' {1..2100})"
broken=$(mktemp -d)
cp -L examples/models/austen/* "$broken/"
truncate -s 100000 "$broken/model.safetensors"
expect_error "model.safetensors" --model "$broken"
echo '{"architectures": ["GPT2LMHeadModel"]}' >"$broken/config.json"
expect_error "GPT2LMHeadModel" --model "$broken"
echo '{"architectures": ["GPT2\n\u001b[31mModel"]}' >"$broken/config.json"
expect_error "GPT2??[31mModel" --model "$broken"

((failures == 0)) && echo PASS
exit $((failures != 0))
