# Sourced by ./test and ./demo, from the root of the repository: makes everything ready that they need, says what
# it installs, and takes a moment when all is there. Ends the script with one line if it cannot go on.

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

may_install() {
    command -v apt-get >/dev/null && as_root true 2>/dev/null
}

# --- Debian packages: what is looked for, and the package that has it -----------------------------------------

# shellcheck disable=SC1091
distribution() { . /etc/os-release 2>/dev/null && echo "${ID:-unknown}"; }

has_any() {
    for file in "$@"; do
        [ -e "$file" ] && return 0
    done
    return 1
}

# A kernel counts if its modules are there too.
has_kernel() {
    for kernel in /boot/vmlinuz-*; do
        [ -d "/lib/modules/${kernel#/boot/vmlinuz-}/kernel" ] && return 0
    done
    return 1
}

has_static_busybox() {
    [ -x /bin/busybox ] && ! ldd /bin/busybox 2>/dev/null | grep -q '=>'
}

virtiofsd_package() {
    if apt-cache show virtiofsd >/dev/null 2>&1; then echo virtiofsd; else echo qemu-system-common; fi
}

kernel_package() {
    if [ "$(distribution)" = debian ]; then echo linux-image-cloud-amd64; else echo linux-image-virtual; fi
}

# Not every release has every package.
if_there_is() {
    if apt-cache show "$1" >/dev/null 2>&1; then echo "$1"; fi
}

# What both commands need: a compiler, a guest, the lab.
missing_packages() {
    command -v cc >/dev/null || echo gcc libc6-dev
    command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86
    has_any /usr/lib/qemu/virtiofsd /usr/libexec/virtiofsd /usr/lib/virtiofsd || virtiofsd_package
    has_kernel || kernel_package
    has_static_busybox || echo busybox-static
    command -v zstd >/dev/null || echo zstd
    command -v lz4 >/dev/null || echo lz4
    command -v xz >/dev/null || echo xz-utils
}

# What only the tests need: firmware, and peers to talk to.
missing_for_tests() {
    missing_packages
    has_any /usr/share/seabios/bios-256k.bin || echo seabios
    command -v linux.uml >/dev/null || if_there_is user-mode-linux
    command -v dpdk-testpmd >/dev/null || if_there_is dpdk-dev
    command -v nbdkit >/dev/null || echo nbdkit
    [ -n "$(find /usr/lib -name nbdkit-python-plugin.so -print -quit 2>/dev/null)" ] || echo nbdkit-plugin-python
    command -v qemu-nbd >/dev/null || echo qemu-utils
    PATH="$PATH:/usr/sbin:/sbin" command -v ip >/dev/null || echo iproute2
    command -v passt >/dev/null || echo passt
    PATH="$PATH:/usr/sbin:/sbin" command -v mkfs.ext4 >/dev/null || echo e2fsprogs
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
}

# What stays missing costs a skipped test or one line of the demo; it does not stop everything else.
install_packages() {
    if ! may_install; then
        say "missing Debian packages, and neither root nor sudo -n to install them: $*"
        return 1
    fi
    say "installing Debian packages: $*"
    local log package
    log=$(mktemp)
    if ! apt_install "$@" >"$log" 2>&1; then
        for package in "$@"; do
            apt_install "$package" >"$log" 2>&1 || say "apt-get could not install $package: $(tail -n 1 "$log")"
        done
    fi
    rm "$log"
}

# install_missing LIST: what the function LIST names.
install_missing() {
    local missing
    missing=$("$1")
    [ -n "$missing" ] || return 0
    if may_install; then
        as_root apt-get update -qq || say "apt-get update failed"
        missing=$("$1") # names depend on the release
    fi
    # shellcheck disable=SC2086
    install_packages $missing
}

# Ubuntu keeps kernels readable by root only; a guest boots from a copy.
readable_kernels() {
    local kernel copy cache="${XDG_CACHE_HOME:-$HOME/.cache}/pyvirtio"
    for kernel in /boot/vmlinuz-*; do
        copy="$cache/${kernel##*/}"
        if [ -e "$kernel" ] && [ ! -r "$kernel" ] && [ ! -e "$copy" ] && as_root true 2>/dev/null; then
            say "copying $kernel, which only root may read, to $cache"
            mkdir -p "$cache"
            as_root install -m 0644 "$kernel" "$copy" || say "could not read $kernel"
        fi
    done
}

# --- Rust, Python, the extension ------------------------------------------------------------------------------

find_cargo() {
    command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"
    command -v cargo >/dev/null || fail "cargo is missing: install a Rust toolchain, 1.85 or later (rustup has one)"
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later was found"
}

make_venv() {
    .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python) || exit 1
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        may_install && as_root apt-get update -qq
        install_packages "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info.minor)')"
        "$python" -c 'import ensurepip' 2>/dev/null ||
            fail "$python cannot make a virtual environment: install its venv module"
    fi
    say "making a virtual environment in .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || fail "could not make .venv"
}

# A hash of everything the build depends on.
sources_hash() {
    {
        rustc --version
        .venv/bin/python --version
        cat pyproject.toml Cargo.toml Cargo.lock tools/setup.sh
        find rust -type f \( -name '*.rs' -o -name '*.toml' \) -not -path '*/target/*' -print0 | sort -z | xargs -0 cat
    } | sha256sum
}

build_extension() {
    local hash
    hash=$(sources_hash)
    if has_any src/pyvirtio/_core*.so && [ "$(cat .venv/built 2>/dev/null)" = "$hash" ]; then
        return
    fi
    say "installing Python packages and building the extension (some minutes at the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check 'maturin>=1.7,<2' ||
        fail "pip could not install maturin"
    if ! VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release --locked --extras test,docs >.venv/build.log 2>&1; then
        tail -n 40 .venv/build.log
        fail "the build failed; its output is in .venv/build.log"
    fi
    echo "$hash" >.venv/built
}

# What draws the demo's figures, at the versions that pyproject.toml names.
install_plot() {
    .venv/bin/python -c 'import matplotlib' 2>/dev/null && return
    say "installing the Python packages of the extra plot"
    local packages
    packages=$(.venv/bin/python -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["plot"])')
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $packages || fail "pip could not install $packages"
}

# set_up LIST: everything, with the Debian packages that the function LIST names.
set_up() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm); Linux x86_64 is needed"
    install_missing "$1"
    readable_kernels
    find_cargo
    make_venv
    build_extension
}

linux_runs_here() {
    .venv/bin/python -c 'import sys; from pyvirtio.accel.host import linux_capable; sys.exit(linux_capable() is not None)'
}
