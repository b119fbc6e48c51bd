#!/bin/sh
# Installs edge-agent on a gateway, or takes it away. Safe to run again: an existing configuration is never overwritten.
set -eu
# The service runs as a user of its own, who must be able to read what is installed, whatever umask root has.
umask 022

usage() {
    cat <<'USAGE'
Usage: install.sh [install|uninstall] [options]

  --source WHAT     what pip installs: a checkout, a wheel, or a requirement (default: the checkout of this script)
  --extras LIST     extras of the package, for example onnx
  --python FILE     the interpreter for the virtual environment (default: python3)
  --destdir DIR     put everything below DIR and start nothing: for packages and tests
  --files-only      units, rules and configuration; no virtual environment
  --worker          also the unit of the cloud worker
  --no-start        enable the service, do not start it
  --purge           uninstall: also the configuration and the state
USAGE
}

action=install destdir='' extras='' python=python3 venv=yes worker=no start=yes purge=no
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
source=$(dirname -- "$here")

while [ $# -gt 0 ]; do
    case $1 in
        install | uninstall) action=$1 ;;
        --source | --extras | --python | --destdir)
            [ $# -ge 2 ] || { echo "install.sh: $1 needs a value" >&2; exit 2; }
            case $1 in
                --source) source=$2 ;;
                --extras) extras=$2 ;;
                --python) python=$2 ;;
                --destdir) destdir=${2%/} ;;
            esac
            shift ;;
        --files-only) venv=no ;;
        --worker) worker=yes ;;
        --no-start) start=no ;;
        --purge) purge=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "install.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# Where the installed files will look for each other; below --destdir they only lie for now.
final=/opt/edge-agent

if [ -n "$destdir" ]; then
    if [ "$action" = install ]; then
        mkdir -p -- "$destdir"
    fi
    if [ -d "$destdir" ]; then
        destdir=$(CDPATH='' cd -- "$destdir" && pwd -P)
    fi
fi

units=$destdir/etc/systemd/system
config=$destdir/etc/edge-agent
rules=$destdir/etc/udev/rules.d
home=$destdir$final

if [ -z "$destdir" ] && [ "$(id -u)" -ne 0 ]; then
    echo "install.sh: must run as root, or with --destdir" >&2
    exit 1
fi

managed() { [ -z "$destdir" ] && command -v systemctl >/dev/null 2>&1 && [ -d /run/systemd/system ]; }

# keep FILE MODE TARGET: only where there is none yet; what is new is put beside it when it differs.
keep() {
    if [ ! -e "$3" ]; then
        install -m "$2" "$1" "$3"
    elif ! cmp -s "$1" "$3"; then
        install -m "$2" "$1" "$3.new"
        echo "kept $3; the new one is $3.new"
    else
        rm -f "$3.new"
    fi
}

# drop FILE TARGET: what was installed from FILE, unless it was changed since.
drop() {
    if [ "$purge" = yes ] || cmp -s "$1" "$2"; then
        rm -f "$2"
    elif [ -e "$2" ]; then
        echo "kept $2, which was changed; --purge removes it"
    fi
    rm -f "$2.new"
}

make_venv() {
    # One that was interrupted while it was made has no pip, or is not an environment of its own: begin anew.
    "$home/bin/python" -I -c 'import os, sys, pip; sys.exit(not os.path.samefile(sys.prefix, sys.argv[1]))' "$home" \
        >/dev/null 2>&1 || "$python" -m venv --clear "$home"
    "$home/bin/python" -m pip install --quiet --upgrade "$source${extras:+[$extras]}"
    if [ -d "$home/share" ]; then
        find "$home/share" -name __pycache__ -prune -exec rm -rf {} +
    fi
    if [ -n "$destdir" ]; then
        relocate
    fi
}

# relocate: pip and venv write absolute paths into scripts, into pyvenv.cfg and into compiled modules.
relocate() {
    "$home/bin/python" -I - "$home" "$final" <<'PYTHON'
import sys
from pathlib import Path

home, final = (argument.encode() for argument in sys.argv[1:])
root = Path(sys.argv[1])
for path in [root / "pyvenv.cfg", *(root / "bin").iterdir()]:
    if path.is_file() and not path.is_symlink() and home in (content := path.read_bytes()):
        path.write_bytes(content.replace(home, final))
PYTHON
    "$home/bin/python" -I -m compileall -q -f -s "$destdir" -p / "$home/lib" || true
}

do_install() {
    if [ "$venv" = yes ]; then
        make_venv
    fi
    install -d -m 0755 "$units/edge-agent.service.d" "$rules" "$config"
    install -d -m 0700 "$config/credentials"
    install -m 0644 "$here/edge-agent.service" "$units/edge-agent.service"
    if [ -e /etc/nv_tegra_release ]; then
        keep "$here/edge-agent.service.d/jetson.conf" 0644 "$units/edge-agent.service.d/jetson.conf"
    fi
    keep "$here/99-edge-agent.rules" 0644 "$rules/99-edge-agent.rules"
    keep "$here/edge-agent.yaml" 0644 "$config/edge-agent.yaml"
    keep "$here/edge-agent.env" 0600 "$config/edge-agent.env"
    if [ "$worker" = yes ] || [ -e "$units/edge-agent-worker.service" ]; then
        install -m 0644 "$here/edge-agent-worker.service" "$units/edge-agent-worker.service"
        keep "$here/worker.env" 0600 "$config/worker.env"
    fi
    if managed; then
        if [ "$venv" = yes ]; then
            "$home/bin/edge-agent" check "$config/edge-agent.yaml"
        fi
        systemctl daemon-reload
        udevadm control --reload || true
        systemctl enable --quiet edge-agent.service
        if [ "$start" = yes ]; then
            systemctl restart edge-agent.service
            systemctl try-restart edge-agent-worker.service 2>/dev/null || true # its program was replaced as well
        fi
    fi
    echo "installed; configuration: $config/edge-agent.yaml"
}

do_uninstall() {
    if managed; then
        systemctl disable --now --quiet edge-agent.service 2>/dev/null || true
        systemctl disable --now --quiet edge-agent-worker.service 2>/dev/null || true
    fi
    rm -f "$units/edge-agent.service" "$units/edge-agent-worker.service"
    drop "$here/edge-agent.service.d/jetson.conf" "$units/edge-agent.service.d/jetson.conf"
    rmdir "$units/edge-agent.service.d" 2>/dev/null || true
    drop "$here/99-edge-agent.rules" "$rules/99-edge-agent.rules"
    if [ -e "$home/pyvenv.cfg" ]; then
        rm -rf "$home"
    fi
    if [ "$purge" = yes ]; then
        # Drop-ins of `systemctl edit` name credentials that are gone now: a later installation would not start.
        rm -rf "$config" "$units/edge-agent.service.d" "$units/edge-agent-worker.service.d"
        for state in edge-agent edge-agent-worker; do
            rm -rf "$destdir/var/lib/$state" "$destdir/var/lib/private/$state"
        done
    else
        echo "kept $config and the state directory; --purge removes them"
    fi
    if managed; then
        systemctl daemon-reload
    fi
}

"do_$action"
