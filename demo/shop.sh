# What runs in the demo's pod: a Redis server, and a Python that reads what is typed into the FIFO `keyboard`.
mkdir -p /srv/demo && cd /srv/demo && mkfifo keyboard
redis-server --port 6379 --dir /srv/demo --appendonly yes --save '' --daemonize yes --logfile redis.log > /dev/null
sleep infinity > keyboard &
exec python3 -q -i -u < keyboard 2>&1
