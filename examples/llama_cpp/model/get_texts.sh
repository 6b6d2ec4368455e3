#!/usr/bin/env bash
# Fetches the public-domain texts that train.py reads, out of Debian packages, and writes them as
# plain text files. Nothing is installed.
#
#   usage: get_texts.sh FOLDER
#
# Training texts, in FOLDER/train: the King James Bible and the World English Bible from Genesis to
# Malachi, Henry's Concise Commentary on the same books, Spurgeon's Treasury of David, six novels of
# Jane Austen, Newton's Opticks up to its Query 31, Twain's Tom Sawyer, Bierce's Devil's Dictionary,
# and the Jargon File.
# Texts held out, in FOLDER/heldout: the King James Bible from Matthew to Revelation, and Opticks
# from Query 31 on.
# Needs python3, iconv, and a Debian or Ubuntu of x86-64 with apt-get and dpkg-deb. Fetches 65 MB,
# writes 30 MB.
set -euo pipefail

[[ $# -eq 1 ]] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
mkdir -p "$1/train" "$1/heldout"
folder=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages=(bible-kjv bible-kjv-text dict-devil dict-jargon golang-1.19-src
          golang-github-klauspost-compress-dev r-cran-janeaustenr sword-comm-mhcc
          sword-comm-tdavid sword-text-web)
(cd "$work" && apt-get download --quiet "${packages[@]}" >&2)
for package in "${packages[@]}"; do
  dpkg-deb -x "$work/$package"_*.deb "$work/x"
done
share=$work/x/usr/share

# One verse a line: "Ge1:1 In the beginning God created the heaven and the earth."
bible() {
  env -u COLUMNS "$work/x/usr/bin/bible" -p "$work/x/usr/lib" -f "$1" </dev/null 2>/dev/null
}
bible gen1:1-mal4:6 >"$folder/train/kjv.txt"
bible mat1:1-rev22:21 >"$folder/heldout/kjv.txt"

opticks=$share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt
head -n 8569 "$opticks" >"$folder/train/opticks.txt"
tail -n +8570 "$opticks" | sed '/End of the Project Gutenberg/,$d' >"$folder/heldout/opticks.txt"

cp "$share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt" \
  "$folder/train/sawyer.txt"
gzip -dc <"$share/dictd/devil.dict.dz" >"$folder/train/devil.txt"
gzip -dc <"$share/dictd/jargon.dict.dz" >"$folder/train/jargon.txt"

# Modules of the SWORD library: zlib blocks listed in an index, marked up. R data: zlib blocks too.
python3 - "$share/sword/modules" "$work/x/usr/lib/R/site-library" "$folder/train" <<'PYTHON'
import html, re, struct, sys, zlib
from pathlib import Path

sword, r_library, out = map(Path, sys.argv[1:])

def sword_text(stem, kind):
    index = Path(f"{stem}.{kind}zs").read_bytes()
    data = Path(f"{stem}.{kind}zz").read_bytes()
    blocks = []
    for offset, size, _ in struct.iter_unpack("<III", index):
        blocks.append(zlib.decompress(data[offset:offset + size]).decode() if size else "")
    text = re.sub(r"<note\b.*?</note>", "", "\n".join(blocks), flags=re.S)
    text = re.sub(r"<(lb|p|/p|/l|/lg|verse|chapter|div|/div|title|/title|br)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text)).replace("\0", "\n")
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text))

for name, stem, kind in (("web", "texts/ztext/engWEB2015eb/ot", "b"),
                         ("mhcc", "comments/zcom/mhcc/ot", "b"),
                         ("tdavid", "comments/zcom/tdavid/ot", "c")):
    (out / f"{name}.txt").write_text(sword_text(sword / stem, kind))

data, lines = (r_library / "janeaustenr/data/Rdata.rdb").read_bytes(), []
while len(data) > 4:
    block = zlib.decompressobj()
    text = block.decompress(data[4:])
    data = block.unused_data
    at = 0
    while (at := text.find(b"\x09", at)) >= 0:  # strings: flags that end in 9, length, bytes
        size = int.from_bytes(text[at + 1:at + 5], "big")
        if text[at - 3:at] in (b"\0\x04\0", b"\0\0\x80", b"\0\0\x40") and size < 200:
            lines.append(text[at + 5:at + 5 + size].decode())
            at += 4 + size
        at += 1
(out / "austen.txt").write_text("\n".join(lines) + "\n")
PYTHON

# Plain ASCII: the few accented letters and typographic signs become their nearest ASCII form.
for file in "$folder"/train/*.txt "$folder"/heldout/*.txt; do
  iconv -c -f UTF-8 -t ASCII//TRANSLIT "$file" >"$file.new" && mv "$file.new" "$file"
done
wc -c "$folder"/train/*.txt "$folder"/heldout/*.txt
