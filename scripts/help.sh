# source help.sh If an argument of the script is -h or --help, prints its help and exits, before
# anything is made. The help is the comment at its head or, for links to scripts/demo, that of the
# Python script.
# shellcheck shell=bash

for argument; do
    [[ $argument == -h || $argument == --help ]] || continue
    if [[ -f $0.py ]]; then
        "$(dirname "$0")/../.venv/bin/python" "$0.py" --help 2>/dev/null || sed -n '1,/"""$/{s/"""//;p}' "$0.py"
    else
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    fi
    exit
done
