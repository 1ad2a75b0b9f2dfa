#!/usr/bin/env bash
# Runs a command, and runs it again as long as its exit status says that this can help:
#
#     launch/again.sh launch/local.sh 8 -- .venv/bin/ladder-jax train RECIPE --resume
#
# Again: after 75 (another host failed or was lost), and after a status above 128 (the
# command was killed; or it was told to stop, and saved). Not after 0 (done), nor after
# another status (a mistake in the command, a full disk): it would end so again.
# SIGTERM, Ctrl-C and SIGHUP are passed on to the command, and end this script with it.
#
# RESTARTS: the most times (default 100). PAUSE: seconds before each (default 10).
set -euo pipefail
: "${1:?the command to run}"

stopping='' child=''
# shellcheck disable=SC2329  # the traps call it
pass_on() {  # SIGNAL
    stopping=1
    if [[ $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
for signal in TERM INT HUP; do
    # shellcheck disable=SC2064  # the signal's name is known now
    trap "pass_on $signal" "$signal"
done

run() {  # COMMAND; sets status. A signal interrupts `wait`, and the command goes on.
    set -m  # a group of its own, in which Ctrl-C is not ignored
    "$@" </dev/null &
    child=$!
    set +m
    status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    child=''
}

for ((restart = 1; ; restart++)); do
    run "$@"
    ((status == 75 || status > 128)) || break
    [[ ! $stopping ]] || break
    if ((restart > ${RESTARTS:-100})); then
        echo "again.sh: status $status, after ${RESTARTS:-100} restarts: giving up" >&2
        break
    fi
    echo "again.sh: status $status: again in ${PAUSE:-10} s, restart $restart" >&2
    sleep "${PAUSE:-10}" >/dev/null 2>&1 &
    wait $! || { kill $! && break; }  # a signal ended the wait
done
exit "$status"
