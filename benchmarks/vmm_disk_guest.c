/* Disk load for a guest without a C library's fio: Linux AIO by raw system calls, O_DIRECT.
 *
 *     vmm_disk_guest DEVICE randread|randwrite|seqread|seqwrite BLOCK DEPTH SECONDS
 *
 * prints "RESULT mode block depth operations/s". Build: gcc -O2 -static.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 128

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	static struct iocb blocks[MAX_DEPTH];
	static struct io_event events[MAX_DEPTH];
	struct iocb *list[MAX_DEPTH];
	aio_context_t context = 0;
	uint64_t size, places, next = 0, seed = 88172645463325252ull;
	long done = 0;

	if (argc != 6)
		return 2;
	int writes = strstr(argv[2], "write") != NULL, sequential = !strncmp(argv[2], "seq", 3);
	long block = atol(argv[3]), depth = atol(argv[4]);
	double seconds = atof(argv[5]);
	int fd = open(argv[1], (writes ? O_RDWR : O_RDONLY) | O_DIRECT);

	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || depth < 1 || depth > MAX_DEPTH ||
	    syscall(SYS_io_setup, depth, &context)) {
		perror("setup");
		return 1;
	}
	places = size / block;
	for (long i = 0; i < depth; i++) {
		void *memory;

		if (posix_memalign(&memory, 4096, block))
			return 1;
		memset(memory, 0x5a, block);
		blocks[i].aio_fildes = fd;
		blocks[i].aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		blocks[i].aio_buf = (uint64_t)memory;
		blocks[i].aio_nbytes = block;
		blocks[i].aio_data = i;
		list[i] = &blocks[i];
	}
	long ready = depth;
	double start = now(), end = start + seconds, at = start;

	while (at < end) {
		for (long i = 0; i < ready; i++) {
			seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
			list[i]->aio_offset = (sequential ? next++ % places : seed % places) * block;
		}
		if (syscall(SYS_io_submit, context, ready, list) != ready) {
			perror("io_submit");
			return 1;
		}
		ready = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		for (long i = 0; i < ready; i++) {
			if (events[i].res != block) {
				fprintf(stderr, "result %lld\n", (long long)events[i].res);
				return 1;
			}
			list[i] = &blocks[events[i].data];
		}
		done += ready;
		at = now();
	}
	printf("RESULT %s %ld %ld %.1f\n", argv[2], block, depth, done / (at - start));
	return 0;
}
