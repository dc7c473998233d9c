#!/bin/sh
# The French manual pages of an unpacked Debian package as text, one file a page: sh frontier_pages.sh DEB PAGES
set -e
mkdir -p "$2"
for page in "$1"/usr/share/man/fr/man*/*.gz; do
  if [ ! -L "$page" ]; then
    LC_ALL=C.UTF-8 MANWIDTH=1000 man -E UTF-8 --no-hyphenation --no-justification -l "$page" 2>/dev/null | col -bx \
      >"$2/$(basename "$page" .gz).txt"
  fi
done
