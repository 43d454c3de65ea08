"""Say how many tests ran: `test_summary.py NAME=JUNIT_XML ...`. Fails if a part ran none."""

import sys
import xml.etree.ElementTree as ElementTree

parts = []
for argument in sys.argv[1:]:
    name, path = argument.split("=", 1)
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    ran, failed, skipped = (
        sum(int(suite.get(key) or 0) for suite in suites for key in keys)
        for keys in (["tests"], ["failures", "errors"], ["skipped", "disabled"])
    )
    if ran - skipped <= 0:
        sys.exit(f"[test] {name}: expected tests, got {ran} of which {skipped} skipped")
    parts.append(f"{name} {ran - failed - skipped} passed, {failed} failed, {skipped} skipped")
print("Tests: " + "; ".join(parts))
