#!/usr/bin/env bash
# Makes .venv in the checkout: the pinned requirements, and the embedded model and data. Every other script calls it
# first. When nothing has changed it is done in a few hundredths of a second.
#
#   bash scripts/setup.sh           what training needs
#   bash scripts/setup.sh --test    and what scripts/test.sh needs
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer); the default is python3, or the one .venv was made with.
# .venv belongs to this script: one that is broken, or that another PYTHON made, is made anew.
#
# Why .venv is built in place and not aside and then moved: a virtual environment has its own path inside (the first
# line of every command, and activate), so a moved one would call the interpreter of a folder that is gone; and in
# place a changed pin costs seconds, not the whole download. What keeps a half-made .venv from being used:
#   .venv/.setup, .venv/.setup-test   the stamps, written last: hash of the requirements files, and Python's version
#   .venv/.unfinished                 there from the first write to the last: if it is still there, then somebody pulled
#                                     the plug, and as pip takes a half-copied package for an installed one, .venv is
#                                     made anew
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
venv="$root/.venv"
unfinished="$venv/.unfinished"
log="$venv/.setup.log"

files=("$root/requirements.txt" "$root/requirements-embedded.txt")
case "${1:-}" in
    "") stamp="$venv/.setup" ;;
    --test) stamp="$venv/.setup-test" && files+=("$root/requirements-test.txt") ;;
    *) echo "setup.sh: unknown argument '$1' (there is only --test)" >&2 && exit 2 ;;
esac

say() { echo "setup: $*" >&2; }

version() { "$1" -V 2>&1; } # "Python 3.11.7", and an error message where there is no such command

new_enough() { [[ "$1" =~ ^Python\ ([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] * 1000 + BASH_REMATCH[2] >= 3011)); }

fingerprint() { # requirements files -> what their stamp must hold for .venv to be complete and up to date
    version "$venv/bin/python" && cat -- "$@" | cksum
}

same_python() { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version "$venv/bin/python")" ]; }

up_to_date() {
    [ -f "$stamp" ] && [ ! -e "$unfinished" ] && [ "$(<"$stamp")" = "$(fingerprint "${files[@]}")" ] && same_python
}

usable() { # an environment that pip can go on with
    [ ! -e "$unfinished" ] && new_enough "$(version "$venv/bin/python")" && same_python &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

fail() { # $1: what failed; the log's end says why
    say "FAILED: $1. The last lines were:"
    tail -n 15 -- "$log" 2>/dev/null | sed 's/^/    /' >&2
    undo
    exit 1
}

undo() { # Leave .venv as it was, or nothing. pip says "Installing" right before it first touches the environment.
    if [ "$fresh" = no ] && ! grep -q '^Installing collected' "$log"; then
        rm -f -- "$unfinished"
        say "$venv is unchanged, and not up to date."
    else
        rm -rf -- "$venv"
        say "removed the incomplete $venv; run the same command again to start anew."
    fi
}

install() { # pip's arguments. A person sees what is being waited for, the log holds the rest.
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee -a -- "$log" | while IFS= read -r line; do
            case "$line" in *Downloading* | "Installing collected"*) printf '    %.110s\n' "${line#  }" >&2 ;; esac
        done
}

up_to_date && exit 0

# pip inherits the lock: if this script alone is killed, the next set-up still waits for the orphan.
exec 9>"$root/.venv.lock" || exit 1
if ! command -v flock >/dev/null; then
    say "there is no flock command here: do not start two set-ups at the same time."
elif ! flock -n 9; then
    say "another set-up of this checkout is running, waiting for it."
    flock 9 || exit 1
fi
up_to_date && exit 0

fresh=no
if ! usable; then
    python="${PYTHON:-python3}"
    found=$(version "$python")
    found=${found%%$'\n'*}
    if ! new_enough "$found"; then
        say "Python 3.11 or newer is needed, but '$python' is: ${found##*: }. Name one, as in PYTHON=python3.12."
        exit 1
    fi
    [ ! -e "$venv" ] || say "$venv is incomplete or of another Python, making it anew."
    fresh=yes
    rm -rf -- "$venv" || exit 1
    mkdir -- "$venv" || exit 1
fi

trap 'say "interrupted."; undo; exit 130' INT TERM HUP
: >"$unfinished" || exit 1
: >"$log"
rm -f -- "$venv/.setup" "$venv/.setup-test"

if [ "$fresh" = yes ]; then
    say "making $venv with $found: some minutes and gigabytes, once."
    "$python" -m venv "$venv" >>"$log" 2>&1 || fail "'$python -m venv $venv'"
else
    say "bringing $venv up to date."
fi
plain_stamp=$(fingerprint "${files[@]:0:2}") # of the files as they are now: they may be edited meanwhile
stamp_text=$(fingerprint "${files[@]}")
for file in "${files[@]}"; do
    say "installing $(basename -- "$file")"
    options=()
    [ "$file" != "$root/requirements-embedded.txt" ] || options=(--no-deps)
    install ${options[@]+"${options[@]}"} -r "$file" || fail "pip could not install $(basename -- "$file")"
done

rm -f -- "$unfinished"
{ echo "$plain_stamp" >"$venv/.setup" && echo "$stamp_text" >"$stamp"; } || fail "could not write $stamp"
say "done."
