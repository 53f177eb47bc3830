/* Echoes on a vsock: `vsock listen PORT` to one who connects, `vsock connect CID PORT` to one it connects to. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	static char block[65536];
	int listens = argc > 1 && !strcmp(argv[1], "listen");
	struct sockaddr_vm at = { .svm_family = AF_VSOCK };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	ssize_t count;

	if (argc != (listens ? 3 : 4))
		return 2;
	at.svm_cid = listens ? VMADDR_CID_ANY : atoi(argv[2]);
	at.svm_port = atoi(argv[argc - 1]);
	if (fd < 0 || (listens ? bind(fd, (void *)&at, sizeof(at)) || listen(fd, 1) || (fd = accept(fd, NULL, NULL)) < 0
			       : connect(fd, (void *)&at, sizeof(at)))) {
		perror("vsock");
		return 1;
	}
	while ((count = read(fd, block, sizeof(block))) > 0)
		for (ssize_t done = 0, more; done < count; done += more)
			if ((more = write(fd, block + done, count - done)) <= 0)
				return 1;
	return 0;
}
