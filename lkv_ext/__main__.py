"""`python -m lkv_ext` prints what this build is made of."""

from lkv_ext import build_info


def main() -> None:
    info = build_info()
    width = max(map(len, info))
    for key, value in info.items():
        print(f"{key:{width}}  {value}")


if __name__ == "__main__":
    main()
