# What commands.sh and ranks.sh share, who read it with `.`: a temporary directory to work in, and checks that count.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0
failed=0

pass() { passed=$((passed + 1)); }
fail() {
  failed=$((failed + 1))
  echo "FAILED: $1"
  [ -f err ] && sed 's/^/    /' err | head -5
}
check() { # check NAME COMMAND...: the command succeeds
  name=$1
  shift
  if "$@" >out 2>err; then pass; else fail "$name"; fi
}
refuse() { # refuse PATTERN COMMAND...: exit code 2 and one line on stderr that matches; no new run
  pattern=$1
  shift
  before=$(ls runs 2>/dev/null)
  "$@" >out 2>err
  code=$?
  if [ $code -eq 2 ] && [ "$(wc -l <err)" -eq 1 ] && grep -qE "$pattern" err && [ "$(ls runs 2>/dev/null)" = "$before" ]; then
    pass
  else
    fail "exit $code, wanted 2 and one line with '$pattern': $*"
  fi
}
