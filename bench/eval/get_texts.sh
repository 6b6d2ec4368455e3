#!/usr/bin/env bash
# Gets the texts of the evaluation out of Debian packages, without installing anything, and puts
# them as plain ASCII text files into a cache folder outside the checkout.
#
#   usage: get_texts.sh [FOLDER]
#
# FOLDER defaults to ${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/texts. If it holds all texts already,
# nothing is done. Beside the texts are written manifest.json, which the evaluation reads, and
# SOURCE.txt for people. The last line on standard output is the folder.
#
# The expected sha256 of every text is that of Debian 12. Another version of a package only gives a
# warning: results are then not comparable to published ones, but just as good.
#
# Needs Debian or Ubuntu with apt-get, dpkg-deb, perl (pod2text) and python3; about 65 MB. No root.
set -euo pipefail

packages=(bible-kjv bible-kjv-text golang-1.19-src perl-doc debian-reference-en debian-handbook)
names=(kjv-new-testament opticks-query-31 perl-doc debian-reference debian-handbook)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/kvlean/texts}

fail() {
  printf 'get_texts.sh: %s\n' "$1" >&2
  exit 1
}
if [[ $# -gt 1 || ${1:-} == -* ]]; then
  sed -n '5s/^# *//p' "$0" >&2
  exit 2
fi

complete=yes
for name in "${names[@]}"; do [[ -s $folder/$name.txt ]] || complete=no; done
if [[ $complete == yes && -s $folder/manifest.json ]]; then
  printf '%s\n' "$folder"
  exit 0
fi
for tool in apt-get dpkg-deb pod2text python3 gzip; do
  command -v "$tool" >/dev/null ||
    fail "$tool is needed and was not found; these texts come out of Debian packages"
done

mkdir -p "$folder" || fail "cannot make the folder $folder"
work=$(mktemp -d "$folder/download.XXXXXX")
trap 'rm -rf "$work"' EXIT

options=(-qq)
[[ $(id -u) -ne 0 ]] || options+=(-o APT::Sandbox::User=root)
download() { (cd "$work" && apt-get download "${options[@]}" "$1" >&2) 2>"$work/apt.log"; }
for package in "${packages[@]}"; do
  printf 'downloading %s\n' "$package" >&2
  if ! download "$package"; then
    # Package lists may be old or missing; only root can refresh them.
    if [[ $(id -u) -eq 0 ]]; then apt-get update -qq >&2 || true; fi
    download "$package" || fail "apt-get cannot download $package: $(tail -n 1 "$work/apt.log")"
  fi
done
# Only what is read is unpacked: the sources of Go alone would be 100 MB.
unpack() { dpkg-deb --fsys-tarfile "$work/$1"_*.deb | tar -x -C "$work" --wildcards "$2"; }
unpack bible-kjv './usr/bin/bible'
unpack bible-kjv-text './usr/lib/bible.data*'
unpack golang-1.19-src './usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt'
unpack perl-doc './usr/share/perl/*/pod/*.pod'
unpack debian-reference-en './usr/share/debian-reference/debian-reference.en.txt.gz'
unpack debian-handbook './usr/share/doc/debian-handbook/html/en-US/*.html'

# One verse a line: "Mat1:1 The book of the generation of Jesus Christ, ..."
env -u COLUMNS "$work/usr/bin/bible" -p "$work/usr/lib" -f mat1:1-rev22:21 \
  </dev/null >"$work/kjv.raw" 2>/dev/null || fail "the program bible cannot read its text"
[[ -s $work/kjv.raw ]] || fail "the program bible cannot read its text"

# Manual pages that are prose rather than lists.
pods=(perlintro perlfaq1 perlfaq2 perlfaq3 perlfaq4 perlfaq5 perlfaq6 perlfaq7 perlfaq8 perlfaq9
      perlretut perlreftut perlootut perlopentut perluniintro perlunicook perlunitut perlunifaq
      perlstyle perldsc perllol perlpacktut perlthrtut perldebtut perldebguts perlperf perlsec
      perlport perlsyn perlsub perldata perlobj perlmod perlmodstyle perlnewmod perlipc perlfork
      perllocale perlform perlcall perlembed perlhacktut perlhack perlpolicy perlxstut)
for pod in "${pods[@]}"; do
  file=$(find "$work/usr/share/perl" -name "$pod.pod" -print -quit)
  [[ -n $file ]] || fail "the package perl-doc holds no $pod.pod"
  pod2text --utf8 --width=78 "$file"
  echo
done >"$work/perl-doc.raw"

gzip -dc "$work/usr/share/debian-reference/debian-reference.en.txt.gz" >"$work/reference.raw"

for package in "${packages[@]}"; do
  printf '%s %s\n' "$package" "$(dpkg-deb -f "$work/$package"_*.deb Version)"
done >"$work/versions"

python3 - "$work" "$folder" <<'PYTHON'
import hashlib, html.parser, json, os, re, sys, unicodedata
work, folder = sys.argv[1:]
versions = dict(line.split() for line in open(os.path.join(work, "versions")))


def read(path):
    with open(os.path.join(work, path), encoding="utf-8", errors="replace") as file:
        return file.read()


SIGNS = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2010": "-", "\u2011": "-",
         "\u2012": "-", "\u2013": "-", "\u2014": "--", "\u2022": "*", "\u00d7": "x", "\u00a9": "(c)",
         "\u00ae": "(R)", "\u00e6": "ae", "\u00c6": "Ae", "\u0153": "oe", "\u0152": "Oe",
         "\u00df": "ss", "\u00f8": "o", "\u00d8": "O", "\u2192": "->", "\u2190": "<-",
         "\u00b0": " degrees", "\u00a7": "section ", "\u00b7": "*", "\u00ab": '"', "\u00bb": '"'}


def plain(text):
    """ASCII, no white space at the ends of lines, one empty line at most between paragraphs."""
    text = "".join(SIGNS.get(c, c) for c in text.replace("\r", ""))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.expandtabs(4))
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def kjv():
    """Verses without their labels, a paragraph a chapter."""
    chapters = {}
    for line in read("kjv.raw").splitlines():
        match = re.match(r"([0-9A-Za-z]+):\d+ (.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(match[2])
    return "\n\n".join("\n".join(verses) for verses in chapters.values())


def opticks():
    """From Query 31 on; what stands before is read by other parts of this project."""
    text = read("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt")
    text = text[text.index("_Quest._ 31. Have not"):]
    return re.split(r"\n[^\n]*End of (?:the |this )?Project Gutenberg", text)[0]


def reference():
    """Without the table of contents and without tables."""
    text = read("reference.raw")
    text = text[text.index("\nPreface\n\nTable of Contents"):]
    return "\n".join(line for line in text.splitlines() if not re.match(r"\s*[|+]", line))


class Page(html.parser.HTMLParser):
    """The text of a page of the handbook: titles, paragraphs, listings."""
    BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "tr", "pre", "br"}
    VOID = {"br", "img", "hr", "meta", "link", "input", "col"}

    def __init__(self):
        super().__init__()
        self.out, self.skip, self.listing, self.stack = [], 0, 0, []

    @staticmethod
    def unwanted(tag, attrs):
        attrs = dict(attrs)
        words = (attrs.get("class") or "").split()
        return (tag in ("head", "script", "style", "table") or "toc" in words or "docnav" in words
                or attrs.get("id") in ("banner", "title"))

    def handle_starttag(self, tag, attrs):
        if tag in self.BLOCKS:
            self.out.append("\n\n" if not self.listing else "\n")
        if tag in self.VOID:
            return
        unwanted = self.unwanted(tag, attrs)
        self.stack.append((tag, unwanted))
        self.skip += unwanted
        self.listing += tag == "pre"

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        while self.stack:
            top, unwanted = self.stack.pop()
            self.skip -= unwanted
            self.listing -= top == "pre"
            if top == tag:
                break
        if tag in self.BLOCKS:
            self.out.append("\n\n")

    def handle_data(self, data):
        if not self.skip:
            self.out.append(data if self.listing else re.sub(r"\s+", " ", data))


def handbook():
    base = "usr/share/doc/debian-handbook/html/en-US/"
    pages = list(dict.fromkeys(re.findall(r'href="([^"#/]*\.html)', read(base + "index.html"))))
    out = []
    for page in pages:
        if page == "index.html" or not os.path.exists(os.path.join(work, base + page)):
            continue
        parser = Page()
        parser.feed(read(base + page))
        parser.close()
        text = re.sub(r"\n +", "\n", "".join(parser.out)).replace(" \n", "\n")
        out.append(re.sub(r" {2,}", " ", text))
    return "\n\n".join(out)


TEXTS = [  # name, title, licence, package, its version in Debian 12, sha256, how
    ("kjv-new-testament", "The King James Bible, Matthew to Revelation",
     "public domain", "bible-kjv-text", "4.38",
     "c3d9ddf55a749d1c662546c47da82b7f5d87aa7bae04b7cf1f74b2cdf7b4d73c", kjv),
    ("opticks-query-31", "Isaac Newton, Opticks, 4th edition (London 1730), from Query 31 on",
     "public domain", "golang-1.19-src", "1.19.8-2",
     "9ab3de143011f79131c12f81789a1877d633b464158f07ccbc5120a8aa1c4661", opticks),
    ("perl-doc", "Manual pages of Perl, Larry Wall and others",
     "GPL-1+ or Artistic", "perl-doc", "5.36.0-7+deb12u4",
     "44fb5b2e732162d1493dbcae4f66266bf398dea9550de5883314bbc67d5f0d56",
     lambda: read("perl-doc.raw")),
    ("debian-reference", "Debian Reference, Osamu Aoki",
     "GPL-2+", "debian-reference-en", "2.100",
     "8f6fd72fa2e62d9a9a8bc66ffd8b7a60ee055ee5cf88c27594f351bc6d0be5a7", reference),
    ("debian-handbook", "The Debian Administrator's Handbook, Raphael Hertzog and Roland Mas",
     "GPL-2+ or CC-BY-SA-3.0", "debian-handbook", "11.20220922",
     "e4e875574e0826b3aa60534b8201eaba22770e2fc14a57764d42cfc235fa011e", handbook),
]
manifest, source = [], ""
for name, title, licence, package, version, sha256, make in TEXTS:
    data = plain(make()).encode()
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        print(f"get_texts.sh: warning: {name} differs from the text of {package} {version} "
              f"(here {versions[package]}, sha256 {actual})", file=sys.stderr)
    with open(os.path.join(folder, name + ".txt"), "wb") as file:
        file.write(data)
    manifest.append({"name": name, "title": title, "licence": licence, "package": package,
                     "version": versions[package], "file": name + ".txt", "sha256": actual,
                     "expected": actual == sha256, "bytes": len(data)})
    source += (f"{name}.txt: {title}. Licence: {licence}. Out of the Debian package {package} "
               f"{versions[package]}. {len(data)} bytes, sha256 {actual}.\n")
with open(os.path.join(folder, "SOURCE.txt"), "w") as file:
    file.write("Made by bench/eval/get_texts.sh of KVLean. Converted to plain ASCII.\n\n" + source)
with open(os.path.join(folder, "manifest.json.new"), "w") as file:
    json.dump({"texts": manifest}, file, indent=2)
    file.write("\n")
os.replace(os.path.join(folder, "manifest.json.new"), os.path.join(folder, "manifest.json"))
PYTHON
cat "$folder/SOURCE.txt" >&2
printf '%s\n' "$folder"
