"""The help of settings, taken from the strings under the fields of a dataclass."""

import ast
import inspect
import itertools


def field_help(settings: type) -> dict[str, str]:
    """For each field, the string under it, on one line; fields without one are left out."""
    tree = ast.parse(inspect.getsource(settings))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[field.target.id] = " ".join(text.split())
    return found
