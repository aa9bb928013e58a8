"""`python -m soap_net` is `soap-net`."""

import sys

from soap_net.cli import main

sys.exit(main())
