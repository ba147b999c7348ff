from kernel_pytorch.cli.main import main

raise SystemExit(main())
