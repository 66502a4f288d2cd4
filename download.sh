#!/usr/bin/env bash
# Downloads Llama 2 with the signed link that Meta sends by e-mail.
#
#   ./download.sh                       asks for the link, then for the models
#   ./download.sh 'LINK' 7B,13B-chat    or takes both as arguments (single quotes: the link is full of * and &),
#                                       or from PRESIGNED_URL and MODEL_SIZE; TARGET_FOLDER says where to (default: .)
#
# A file is fetched as NAME.part and gets its real name only when it has proved right, so a file under its real name is
# whole. Stop whenever you like: the next run checks the files that exist and continues. Meta's LICENSE and USE_POLICY.md go into
# each model's own folder, where they cannot overwrite those of the project that this script lies in.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as "sh download.sh"

# Everything below runs on bash 3.2, the one that macOS has.
set -euo pipefail
set -f           # the link holds a "*", which the shell must never expand
export LC_ALL=C  # weights are bytes, not characters

MODELS=7B,13B,70B,7B-chat,13B-chat,70B-chat
REQUEST_PAGE=https://ai.meta.com/resources/models-and-libraries/llama-downloads/
HOW_TO_COPY="In the e-mail, select the text of the link itself, from https:// to its last character, and copy that text:
\"copy link address\" in the menu gives Facebook's wrapper around it, and a click opens it in a browser.
On a command line put the link in single quotes."

say() { printf '%s\n' "$1"; }
die() { printf 'download.sh: %s\n' "$1" >&2; exit 1; }

# ---- What was asked for ----------------------------------------------------------------------------------------------

# Dies unless $1 can be a link from Meta, with a "*" where a file's path goes. It is a secret: no message shows it.
check_link() {
  local fault=""
  case $1 in
    "") fault="no link was given; request one at $REQUEST_PAGE" ;;
    http://l.facebook.com* | https://l.facebook.com*)
      fault="this link begins with l.facebook.com: it wraps the link that you need, and leads to a web page." ;;
    *'"'* | *\\*) fault="the link holds a quote or a backslash, which Meta's links never do." ;;
    http://*'*'* | https://*'*'*) ;;
    http://* | https://*) fault="the link has no * (where a file's name goes): it is not whole, or another link." ;;
    *) fault="this is not a link: it does not begin with https:// (what is wanted is the link in Meta's e-mail)." ;;
  esac
  [[ -z $fault ]] || die "$fault
$HOW_TO_COPY"
}

# The folders of the models named in $1 (separated by commas or spaces), one a line; all of them if it names none.
# An unknown name is printed after a "?".
folders_of() {
  local name
  for name in $(say "${1:-$MODELS}" | tr ',' ' '); do
    if [[ $name =~ ^(7|13|70)[Bb](-chat)?$ ]]; then say "llama-2-$name" | tr 'B' 'b'; else say "?$name"; fi
  done
}

# The shards of a model's folder: one file per model-parallel rank.
shards_of() {
  case $1 in
    llama-2-7b*) echo consolidated.00.pth ;;
    llama-2-13b*) echo consolidated.0{0,1}.pth ;;
    llama-2-70b*) echo consolidated.0{0,1,2,3,4,5,6,7}.pth ;;
  esac
}

# ---- Is a file right? Each check takes the file last -----------------------------------------------------------------

# A web page, or an XML error of the file server: nothing that Meta publishes begins with "<".
is_page() {
  local start
  [[ -s $1 ]] || return 1
  start=$(head -c 512 "$1" | tr -d '[:space:]\000\357\273\277') # the last three: a byte order mark
  [[ $start == '<'* ]]
}

is_document() { [[ -s $1 ]] && ! is_page "$1"; }

has_md5() {
  local sum
  [[ -s $2 ]] || return 1
  # macOS has md5 in place of md5sum; read from stdin, both print the sum first.
  if [[ $hasher == md5sum ]]; then sum=$(md5sum < "$2"); else sum=$(md5 -q < "$2"); fi
  [[ ${sum%% *} == "$1" ]]
}

# The md5 sum that checklist $2 gives for the file named $1; nothing if it does not list it.
listed_md5() {
  local sum name
  while read -r sum name || [[ -n $sum ]]; do
    name=${name%$'\r'}
    if [[ ${name#\*} == "$1" ]]; then say "$sum"; fi
  done < "$2"
}

# $2 is a checklist: nothing but "md5 name" lines, and among them every name in $1.
is_checklist_of() {
  local sum name
  [[ -s $2 ]] || return 1
  while read -r sum name || [[ -n $sum ]]; do
    [[ $sum =~ ^[0-9a-f]{32}$ && -n $name ]] || return 1
  done < "$2"
  for name in $1; do
    [[ -n $(listed_md5 "$name" "$2") ]] || return 1
  done
}

# ---- Getting one file ------------------------------------------------------------------------------------------------

# Runs a command as a process whose number stands in file $1.
# shellcheck disable=SC2016 # the inner bash expands it
noting_pid() { "$BASH" -c 'echo $$ > "$0" && exec "$@"' "$@"; }

command_line() { if [[ -d /proc/$1 ]]; then tr '\0' ' ' < "/proc/$1/cmdline"; else ps -ww -p "$1" -o args=; fi; }

# A script that is killed outright leaves its curl or wget behind, which keeps writing to the part of file $1: beside
# ours, or even after it has been checked and renamed. The process is that one if its command line names the part.
stop_leftover() {
  local pid
  [[ -s $1.pid.part ]] || return 0
  pid=$(< "$1.pid.part")
  while [[ "$(command_line "$pid" 2> /dev/null)" == *"${1##*/}.part"* ]]; do
    kill -9 "$pid" 2> /dev/null || break
  done
  rm -f "$1.pid.part"
}

# Goes on with the part of file $2 where it ends, from path $1 on the server. Sets code (curl's or wget's exit status)
# and status (HTTP's). The link goes in through stdin: an argument stands in the list of processes for all to read.
transfer() {
  local url="${link%%[*]*}$1${link#*[*]}" part=$2.part pid=$2.pid.part log # the path in place of the first "*"
  local header="Accept-Encoding: identity" # a checksum and a continued download are of the bytes as they are published
  code=0
  if [[ $tool == curl ]]; then
    status=$(printf 'url = "%s"\n' "$url" | noting_pid "$pid" curl --config - "${progress[@]}" --header "$header" \
      --globoff --location --fail --connect-timeout 30 --speed-limit 1 --speed-time 60 \
      --continue-at - --output "$part" --write-out '%{http_code}') || code=$?
  else
    log=$(printf '%s\n' "$url" | noting_pid "$pid" wget --input-file=- "${progress[@]}" --header="$header" \
      --server-response --output-file=- --tries=1 --timeout=60 --continue --output-document="$part") || code=$?
    status=$(printf '%s\n' "$log" | sed -n 's,^ *HTTP/[0-9.]* *\([0-9]*\).*,\1,p' | tail -n 1)
  fi
  rm -f "$pid"
  [[ -s $part ]] || rm -f "$part" # wget leaves an empty file when it is refused
}

# Decompresses file $1 if a server or a proxy has compressed it all the same: nothing that Meta publishes is a gzip file.
decompress() {
  [[ -s $1 && $(head -c 2 "$1" | tr -d '\000') == $'\x1f\x8b' ]] || return 0
  if gzip -dc < "$1" > "$1.plain.part" 2> /dev/null; then mv -f "$1.plain.part" "$1"; else rm -f "$1.plain.part"; fi
}

size_of() { if [[ -e $1 ]]; then wc -c < "$1"; else echo 0; fi; }

# fetch PATH FILE CHECK...: makes FILE what lies under PATH on the server; "CHECK... FILE" succeeds if it is right.
fetch() {
  local path=$1 file=$2 part=$2.part before restarted=no
  shift 2
  stop_leftover "$file"
  if [[ -e $file ]]; then
    say "$path: checking the existing file"
    "$@" "$file" && return
    say "$path: the existing file is damaged or incomplete"
    [[ -e $part ]] || mv "$file" "$part" # perhaps only its end is missing
    rm -f "$file"
  fi
  # Without an md5 sum two parts could be of different files: such a (small) file is fetched in one.
  if [[ $1 != has_md5 ]] || is_page "$part"; then rm -f "$part"; fi

  while :; do
    before=$(size_of "$part")
    if ((before > 0)); then say "$path: continuing after $((before)) bytes"; else say "$path: downloading"; fi
    transfer "$path" "$file"
    if ((code == 0)); then decompress "$part"; fi

    if is_page "$part"; then
      rm -f "$part"
      die "$path: the server sent a web page instead of the file; it was deleted.
Either the link is wrong or expired, or a proxy or a login page of your network stands in between.
$HOW_TO_COPY
If that does not help, request a new link at $REQUEST_PAGE"
    elif [[ $status == 403 ]]; then
      die "$path: the server refuses the link (403 Forbidden).
A link is good for 24 hours and for a limited number of downloads; then request a new one at
$REQUEST_PAGE
If it is new, it was perhaps not copied whole. $HOW_TO_COPY
Nothing is lost: run this again with the new link, and it continues where it stopped."
    elif [[ $tool-$code == curl-23 || $tool-$code == wget-3 ]]; then
      die "$path: $part cannot be written beyond $(($(size_of "$part"))) bytes: the disk is full, or no file may be larger there.
What has arrived is kept: free some space and run this again."
    elif ((code == 0)) || [[ $status == 416 && $before -gt 0 ]]; then # 416: there is nothing after the part
      if "$@" "$part"; then
        mv -f "$part" "$file"
        return
      fi
      rm -f "$part" # never emptied: a download that outlived its killed script may still be writing to it
      # A part that lay here may have been the damaged piece, so once it is worth trying without it.
      if ((before == 0)) || [[ $restarted == yes ]]; then
        die "$path: the download is damaged (it fails its check) and was deleted. Run this again.
If that happens every time, remove the .chk file beside it, which is then downloaded again too."
      fi
      restarted=yes
      say "$path: the parts fail the check; starting over"
    elif [[ $tool-$code-$restarted == curl-33-no ]]; then
      rm -f "$part"
      restarted=yes
      say "$path: the server cannot continue a download; starting over"
    elif (($(size_of "$part") > before && code < 128)); then # not by a signal
      say "$path: the connection broke"
    else
      die "$path: could not be downloaded (HTTP status ${status:-none}, $tool ended with $code).
Check the network and the free disk space. What has arrived is kept: run this again to continue."
    fi
  done
}

# fetch_listed FOLDER CHECKLIST NAME...: the checklist, then the files that it vouches for. FOLDER is "" or ends in "/".
fetch_listed() {
  local folder=$1 checklist=$2 name
  shift 2
  fetch "$folder$checklist" "$target/$folder$checklist" is_checklist_of "$*"
  for name in "$@"; do
    fetch "$folder$name" "$target/$folder$name" has_md5 "$(listed_md5 "$name" "$target/$folder$checklist")"
  done
}

# ----------------------------------------------------------------------------------------------------------------------

main() {
  local models folders folder
  target=${TARGET_FOLDER:-.}
  link=${1:-${PRESIGNED_URL:-}}
  if (($# == 0)) && [[ -z $link ]]; then
    read -r -p "The link from Meta's e-mail: " link || true
  fi
  # Mail programs wrap a long link, and its HTML form writes & as &amp;.
  link=$(printf '%s' "$link" | tr -d '[:space:]' | sed 's/&amp;/\&/g')
  check_link "$link"

  if (($# > 1)); then
    shift
    models=$*
  elif [[ -n ${MODEL_SIZE+set} ]]; then
    models=$MODEL_SIZE
  elif ! read -r -p "Models, as in 7B,13B-chat (of $MODELS; empty: all): " models && [[ -z $models ]]; then
    die "no models were named, and stdin is not a terminal to ask on. Give them as the second argument: $MODELS"
  fi
  folders=$(folders_of "$models")
  for folder in ${folders:-?}; do
    [[ $folder != '?'* ]] || die "there is no model \"${folder#[?]}\". The models are $MODELS; nothing was downloaded."
  done

  if command -v curl > /dev/null; then tool=curl
  elif command -v wget > /dev/null; then tool=wget
  else die "neither curl nor wget is installed; install one of them."
  fi
  if command -v md5sum > /dev/null; then hasher=md5sum
  elif command -v md5 > /dev/null; then hasher=md5
  else die "neither md5sum nor md5 is installed, so no file could be checked; install one of them."
  fi
  # A progress bar for people, none for logs.
  case $tool-$([[ ! -t 2 ]] || echo bar) in
    curl-bar) progress=(--progress-bar) ;;
    curl-) progress=(--silent --show-error) ;;
    wget-bar) progress=(--quiet --show-progress --progress=bar:force:noscroll) ;;
    wget-) progress=(--quiet) ;;
  esac

  mkdir -p "$target"
  fetch_listed "" tokenizer_checklist.chk tokenizer.model
  for folder in $folders; do
    mkdir -p "$target/$folder"
    fetch "LICENSE" "$target/$folder/LICENSE" is_document
    fetch "USE_POLICY.md" "$target/$folder/USE_POLICY.md" is_document
    # shellcheck disable=SC2046 # one word per shard
    fetch_listed "$folder/" checklist.chk params.json $(shards_of "$folder")
  done
  say "Done: everything is in $target and has been checked."
}

main "$@"
