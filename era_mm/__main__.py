"""``python -m era_mm`` prints the packages era_mm found."""

from era_mm.hosts import print_hosts

if __name__ == '__main__':
    print_hosts()
