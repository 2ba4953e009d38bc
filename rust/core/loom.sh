#!/bin/sh
# The model of the notification protocol under loom, then three builds that lack something and must fail it.
set -eu
cd "$(dirname "$0")"

# Build the model with the given cfgs and print the path of its executable.
build() {
    cargo rustc --quiet --locked --lib --profile test --message-format=json -- \
        --cfg loom -C opt-level=2 -C debug-assertions=off "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
}

# Without the thing named by the cfg $1, some test matching $2 must fail.
must_fail() {
    if output=$("$(build --cfg "$1")" "$2" 2>&1); then
        echo "$output"
        echo "$1: the model did not notice"
        exit 1
    fi
    case $output in
    *"test result: FAILED"*) echo "$1: the model fails, as it must" ;;
    *) echo "$output" && exit 1 ;;
    esac
}

"$(build)" model::
must_fail lose_fence no_interrupt_is_lost
must_fail lose_fence no_kick_is_lost_between_drain_and_rearm
must_fail lose_last_look no_kick_is_lost_between_drain_and_rearm
must_fail lose_last_read no_kick_is_lost_when_the_eventfd_is_detached
