/* Network load between a guest and its host: TCP streams both ways, UDP round trips.
 *
 *     vmm_net_guest serve                       TCP 7001 sends, TCP 7002 discards, UDP 7003 echoes
 *     vmm_net_guest tx|rx|rr ADDRESS SECONDS    against those; rr sends again what is lost for a second
 *     vmm_net_guest small ADDRESS SECONDS       as tx, 64 bytes a packet
 *     vmm_net_guest count ADDRESS TRIPS         round trips by number
 *
 * prints "RESULT tx|rx|small bytes/s" or "RESULT rr trips/s longest-ms lost". Build: gcc -O2 -static.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SEND_PORT 7001
#define DISCARD_PORT 7002
#define ECHO_PORT 7003
#define SMALL 64

static char block[1 << 17];

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int open_socket(int kind, const char *address, int port, int serve)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, kind, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || !inet_aton(address, &at.sin_addr) ||
	    (serve ? bind(fd, (struct sockaddr *)&at, sizeof(at)) || (kind == SOCK_STREAM && listen(fd, 8))
		   : connect(fd, (struct sockaddr *)&at, sizeof(at)))) {
		perror("socket");
		exit(1);
	}
	return fd;
}

static void serve_stream(int port)
{
	int listener = open_socket(SOCK_STREAM, "0.0.0.0", port, 1);

	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (!fork()) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (port == SEND_PORT)
				while (write(fd, block, sizeof(block)) > 0)
					;
			else
				while (read(fd, block, sizeof(block)) > 0)
					;
			_exit(0);
		}
		close(fd);
	}
}

static void serve(void)
{
	struct sockaddr_in from;
	socklen_t size;
	int fd;

	signal(SIGCHLD, SIG_IGN);
	serve_stream(SEND_PORT);
	serve_stream(DISCARD_PORT);
	fd = open_socket(SOCK_DGRAM, "0.0.0.0", ECHO_PORT, 1);
	puts("ready");
	fflush(stdout);
	for (;;) {
		size = sizeof(from);
		ssize_t count = recvfrom(fd, block, sizeof(block), 0, (struct sockaddr *)&from, &size);

		if (count > 0)
			sendto(fd, block, count, 0, (struct sockaddr *)&from, size);
	}
}

static void stream(const char *mode, const char *address, double seconds)
{
	int small = !strcmp(mode, "small"), out = small || !strcmp(mode, "tx");
	int fd = open_socket(SOCK_STREAM, address, out ? DISCARD_PORT : SEND_PORT, 0);
	size_t size = small ? SMALL : sizeof(block);
	double start = now(), at = start, bytes = 0;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &small, sizeof(small));
	for (; at < start + seconds; at = now()) {
		ssize_t count = out ? write(fd, block, size) : read(fd, block, size);

		if (count <= 0) {
			perror(mode);
			exit(1);
		}
		bytes += count;
	}
	printf("RESULT %s %.0f\n", mode, bytes / (at - start));
}

static void round_trips(const char *address, double seconds, uint64_t trips)
{
	int fd = open_socket(SOCK_DGRAM, address, ECHO_PORT, 0);
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	double start = now(), at = start, longest = 0;
	uint64_t number = 0, lost = 0, answer;

	while (number < trips && at < start + seconds) {
		double sent = at;

		if (send(fd, &number, sizeof(number), 0) < 0)
			perror("send");
		do {
			if (poll(&wait, 1, 1000) <= 0) {
				lost++;
				break;
			}
			if (recv(fd, &answer, sizeof(answer), 0) == sizeof(answer) && answer == number)
				number++;
			else
				continue;
			break;
		} while (1);
		at = now();
		if (at - sent > longest)
			longest = at - sent;
	}
	printf("RESULT rr %.1f %.1f %llu\n", number / (at - start), longest * 1e3, (unsigned long long)lost);
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 2 && !strcmp(argv[1], "serve"))
		serve();
	if (argc != 4)
		return 2;
	if (!strcmp(argv[1], "rr"))
		round_trips(argv[2], atof(argv[3]), UINT64_MAX);
	else if (!strcmp(argv[1], "count"))
		round_trips(argv[2], 1e9, atoll(argv[3]));
	else
		stream(argv[1], argv[2], atof(argv[3]));
	return 0;
}
